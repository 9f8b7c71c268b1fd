"""The cost of the loss beside its peers: `ratios` and `test_speed` in time, `memory` and `test_memory` in bytes."""
