from hypothesis import HealthCheck, settings

# A busy machine makes any example slow; time decides no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
