"""The models: Flax Linen, NHWC, written for this program; `train` chooses BatchNorm's batch or running statistics."""
