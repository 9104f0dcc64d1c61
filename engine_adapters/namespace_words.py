"""What an engine says of its namespace when it starts."""

from __future__ import annotations

from kvstore.namespace import Namespace


def namespace_words(namespace: Namespace) -> str:
    """The namespace in one line, and how to learn why chunks of others are not loaded."""
    name = namespace.name
    return (
        f"stored KV is kept under namespace {name}: {namespace.summary}; "
        f"`kvstore doctor --namespace {name}` tells it from others of this model"
    )
