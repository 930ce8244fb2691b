"""Several experts of one model in one launch: an ordinary run each, side by side where there are ranks for it."""
