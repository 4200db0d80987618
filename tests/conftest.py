from hypothesis import Phase, settings

# No shrinking: most examples are seeds, and no seed is simpler than another.
settings.register_profile("default", deadline=None, max_examples=30, derandomize=True, database=None,
                          phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
settings.load_profile("default")
