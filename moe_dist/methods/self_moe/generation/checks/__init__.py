"""Checks of responses that `filters.check` knows by name. They run in the locked-down process, never here."""
