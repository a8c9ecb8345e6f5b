"""Flax: models whose layers write probes. Nothing else imports Flax, and this does at the first call only."""
