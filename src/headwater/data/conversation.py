"""Conversations that somebody asks for: a client's messages, `--chat`; not the rows of a run."""

from __future__ import annotations

from headwater.data.encode import DataSpec


def for_conversation(spec: DataSpec) -> DataSpec:
    """How a conversation is encoded: by the chat template, which a run's `never` forbids for its own rows only."""
    return spec.model_copy(update={"chat_template": "auto"}) if spec.chat_template == "never" else spec
