"""Adapter for Hugging Face transformers.

    with attach(model):
        model.generate(...)

A prompt whose beginning was generated on before, by any process that shares the bucket, is restored
layer by layer instead of computed; what is new is saved.
"""

from kvstore.engine_adapters.transformers.attachment import Attachment, attach
from kvstore.engine_adapters.transformers.bypass import BypassReason
from kvstore.engine_adapters.transformers.generate_call import GenerateReport

__all__ = ["Attachment", "BypassReason", "GenerateReport", "attach"]
