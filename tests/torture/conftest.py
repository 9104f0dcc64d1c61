"""What takes minutes and is worth it: `make torture`. Figures are printed."""

from real_servers import clean_environment, moto, rgw

__all__ = ["clean_environment", "moto", "rgw"]
