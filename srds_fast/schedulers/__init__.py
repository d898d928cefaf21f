"""Every supported scheduler as a table, checked against the scheduler's own `step`."""
