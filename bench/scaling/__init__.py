"""What several devices give: predictions by a simulator, and two processes timed on a machine with two cores."""
