"""The process grid, conjugate collectives, and layers split over a tensor-parallel group. Independent of models."""
