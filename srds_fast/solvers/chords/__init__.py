"""CHORDS."""
