"""Collocation, ParaTAA and ParaDiGMS."""
