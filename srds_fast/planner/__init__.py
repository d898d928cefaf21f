"""The choice of a plan: settings, candidates, costs, calibration."""
