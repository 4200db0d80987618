from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("default")
