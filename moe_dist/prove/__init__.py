"""`moe-dist prove`: a user's own model, cut to a few layers, in the layout of the config against one plain process."""
