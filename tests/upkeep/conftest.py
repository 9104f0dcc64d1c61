from moto_buckets import moto_bucket, moto_url

__all__ = ["moto_bucket", "moto_url"]
