"""How fast and how far optimizers train with and without Eva."""
