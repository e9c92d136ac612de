"""Coming from elsewhere: configurations of mergekit and of mergekit-evolve, as recipes and as studies."""
