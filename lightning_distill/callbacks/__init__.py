"""Callbacks: evaluation, pictures and health of a run; they use public attributes of the module only."""
