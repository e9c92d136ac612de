"""Files: YAML that users write, presets by name, templates, and the one atomic writer."""
