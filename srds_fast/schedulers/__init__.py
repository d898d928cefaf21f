"""Any scheduler as a table, checked against its own `step`."""
