"""Collocation: secant sweeps over all points of the grid, with the network asked at a skeleton of nodes."""
