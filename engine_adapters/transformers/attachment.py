"""`attach`: from then on, the model's plain generate() restores stored prefixes and saves its own."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn, Self

from transformers import PreTrainedModel

from kvstore.engine_adapters.namespace_words import namespace_words
from kvstore.engine_adapters.transformers.attached_model import AttachedModel
from kvstore.engine_adapters.transformers.bypass import BypassReason, bypass_by_arguments, bypass_by_model
from kvstore.engine_adapters.transformers.generate_call import GenerateCall, GenerateReport
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.engine_adapters.transformers.model_namespace import model_namespace
from kvstore.engine_adapters.transformers.weights import WeightsWatch
from kvstore.errors import LayoutMismatchError, MisconfiguredError
from kvstore.kernels.copiers import page_copier
from kvstore.layout import KVLayout
from kvstore.namespace import Namespace
from kvstore.settings import Settings, load_settings
from kvstore.store import KVStore
from kvstore.warn import WarnRarely

_log = logging.getLogger("kvstore.transformers")
_PREFILL = "_prefill"
_HOOKED = ("generate", _PREFILL)
# As long as setting up a connection may take; with a store out of reach the model works all the same.
_CONNECT_S = 5.0
# The generate() call under way in this thread, for the prefill that it will make.
_current: ContextVar[GenerateCall | None] = ContextVar("kvstore_generate_call", default=None)


def attach(
    model: PreTrainedModel,
    store: KVStore | None = None,
    *,
    weights_revision: str | None = None,
    settings: Settings | None = None,
) -> Attachment:
    """Let `model.generate()` restore and save KV through `store`, until the attachment is detached.

    store             by default one is opened for the model, and closed by `detach`
    weights_revision  names the exact weights; by default a fingerprint of them is taken, which reads
                      every byte once
    settings          for the store that is opened; by default those of the environment

    The model runs two tokens once, to see what its cache is like. Raises UnsupportedModelError if
    its KV cannot be stored and restored exactly, LayoutMismatchError if `store` is for another
    layout, and MisconfiguredError for arguments that cannot work.
    """
    if store is not None and settings is not None:
        raise MisconfiguredError(
            "settings are for the store that attach opens; the one passed in has its own"
        )
    if isinstance(getattr(vars(model).get("generate"), "__self__", None), Attachment):
        raise MisconfiguredError(
            f"this {type(model).__name__} is attached already; detach() that attachment first"
        )
    geometry = observe_geometry(model)
    if store is None:
        settings = settings or load_settings()
        layout = geometry.layout(settings.chunk_tokens)
    else:
        layout = _agreed_layout(geometry.layout(store.layout.chunk_tokens), store)
    weights = WeightsWatch(model)
    namespace = model_namespace(model, layout, weights_revision)
    on_gpu = all(device.type == "cuda" for device in geometry.devices)
    used = _connected_store(layout, settings, on_gpu=on_gpu) if store is None else store
    namespace = dataclasses.replace(namespace, fidelity=used.fidelity)
    _log.info("%s", namespace_words(namespace))
    used.describe(namespace)
    used.prepare(namespace)
    copier = page_copier(used.form, geometry.devices, used.tensor_codec)
    attached = AttachedModel(model, geometry, weights, namespace, used, copier, WarnRarely(_log))
    return Attachment(attached, owns_store=store is None)


class Attachment:
    """A model whose generate() goes through a store. A context manager: leaving it detaches."""

    def __init__(self, attached: AttachedModel, *, owns_store: bool) -> None:
        self._attached = attached
        self._owns_store = owns_store
        self._active = True
        self._last: GenerateReport | None = None
        self._bypasses: Counter[BypassReason] = Counter()
        host: Any = attached.model
        # Kept to be put back, where someone else has wrapped generate() on this instance.
        self._replaced = {name: vars(host)[name] for name in _HOOKED if name in vars(host)}
        self._plain_generate: Callable[..., Any] = host.generate
        self._plain_prefill: Callable[..., Any] = getattr(host, _PREFILL)
        self._generate_signature = inspect.signature(self._plain_generate)
        host.generate = self._generate
        setattr(host, _PREFILL, self._prefill)

    @property
    def store(self) -> KVStore:
        """The store in use."""
        return self._attached.store

    @property
    def namespace(self) -> Namespace:
        """What the model's KV is kept under."""
        return self._attached.namespace

    @property
    def last(self) -> GenerateReport | None:
        """What was done for the generate() call that ended last, of any thread; None before the first."""
        return self._last

    @property
    def bypasses(self) -> Mapping[BypassReason, int]:
        """How many generate() calls went without the store, by reason."""
        return MappingProxyType(self._bypasses)

    def detach(self) -> None:
        """Give the model its own generate() back, and close the store if attach opened it. Safe to repeat."""
        if not self._active:
            return
        self._active = False
        own = vars(self._attached.model)
        for name, ours in zip(_HOOKED, (self._generate, self._prefill), strict=True):
            # Where someone has wrapped ours since, theirs stays and ours only passes calls on.
            if own.get(name) == ours:
                del own[name]
                own.update({name: self._replaced[name]} if name in self._replaced else {})
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __reduce__(self) -> NoReturn:
        raise MisconfiguredError("an attached model cannot be copied or pickled; detach() it first")

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        why = self._bypass(args, kwargs) if self._active else None
        if why is not None or not self._active:
            with _calling(None):
                output = self._plain_generate(*args, **kwargs)
            report = GenerateReport(bypass=why)
        else:
            call = GenerateCall(self._attached)
            try:
                with _calling(call):
                    output = self._plain_generate(*args, **kwargs)
                call.save(output)
            finally:
                call.close()
            report = call.report()
        self._note(report)
        return output

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        call = _current.get()
        if call is None:
            return self._plain_prefill(*args, **kwargs)
        return call.prefill(self._plain_prefill, *args, **kwargs)

    def _bypass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BypassReason | None:
        try:
            named = self._generate_signature.bind(*args, **kwargs).arguments
        except TypeError:
            # generate() itself says what is wrong with them.
            return BypassReason.OTHER_INPUTS
        return bypass_by_arguments({**named.pop("kwargs", {}), **named}) or bypass_by_model(
            self._attached.model, self._attached.weights
        )

    def _note(self, report: GenerateReport) -> None:
        self._last = report
        if report.bypass is None:
            return
        self._bypasses[report.bypass] += 1
        if self._bypasses[report.bypass] == 1:
            advice = "; attach the model again" if report.bypass is BypassReason.WEIGHTS_CHANGED else ""
            _log.warning("generate() went without the store: %s (said once)%s", report.bypass, advice)


def _connected_store(layout: KVLayout, settings: Settings | None, *, on_gpu: bool) -> KVStore:
    """A store that has heard of its backend, where it can: else the first lookups run into their deadline."""
    # On a CPU the store's own threads dequantize, as many at once as there are.
    store = KVStore.open(layout, settings=settings, keep_quantized=on_gpu)
    store.wait_connected(_CONNECT_S)
    return store


def _agreed_layout(layout: KVLayout, store: KVStore) -> KVLayout:
    if layout.describe() != store.layout.describe() or store.shard != layout.whole:
        raise LayoutMismatchError(
            "the store is not for this model's KV cache:\n"
            f"  model: {layout}, shard {layout.whole}\n  store: {store.layout}, shard {store.shard}"
        )
    return store.layout


@contextmanager
def _calling(call: GenerateCall | None) -> Iterator[None]:
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
