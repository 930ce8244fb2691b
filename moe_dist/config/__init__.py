"""Configuration: typed sections (`schema`), checks (`checks`), YAML and overrides to a config (`load`)."""
