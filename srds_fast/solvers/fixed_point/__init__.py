"""ParaTAA and ParaDiGMS."""
