"""What the stage "merge" leaves for the report: proof.json."""

from typing import Literal, NotRequired, TypedDict


class BaseDifference(TypedDict):
    """A difference of held-out losses in nats a token, with its 95 % interval; a single row or group has none."""

    value: float
    ci95: list[float] | None


class BaseCandidate(TypedDict):
    """One model that was weighed: its held-out loss (nats a token) and how that differs from the first one's."""

    base: str
    loss: float
    rows: int
    tokens: int
    difference: BaseDifference | None


class BaseRecord(TypedDict):
    """The base that was merged into, "original" or "dequantized", why, and what was measured."""

    value: str
    reason: str
    alternatives: list[BaseCandidate]


class LoadingRecord(TypedDict):
    """Whether weights were held "whole" or read "by layers", and why."""

    value: str
    reason: str
    alternatives: list[str]


class ChangedFile(TypedDict):
    """A weight file: its size, and how many of its tensors changed."""

    name: str
    bytes: int
    changed: int


class WeightCheck(TypedDict):
    """What merging changed, read back from disk.

    unchanged: names of adapted weights in which all of the change is nothing or lost in rounding. changed_share: mean
    share of an adapted weight's elements that changed.
    """

    adapted_weights: int
    changed_weights: int
    unchanged_weights: int
    unchanged: list[str]
    changed_share: float
    files: list[ChangedFile]
    bytes_read_back: int


class HeldoutLosses(TypedDict):
    """Mean losses in nats a labelled token."""

    merged: float
    adapter: float


class LogitDifferences(TypedDict):
    """The merged model's logits against those of base + adapter, at labelled positions of held-out rows.

    max_difference and mean_difference are absolute, of logits; kl is the mean KL divergence from base + adapter in nats
    a token, kl_median that of the median position, base_kl the mean one of the bare base; top_token_agreement is a
    share. applied: how much of what the adapter changes in the logits the merged model has, at the median position: 1
    where all of it is there, None where the adapter changes nothing.
    """

    positions: int
    max_difference: float
    mean_difference: float
    top_token_agreement: float
    kl: float
    kl_median: float
    base_kl: float
    applied: float | None
    heldout_loss: HeldoutLosses


class NearTie(TypedDict):
    """The first token (counted from 1) at which two replies part, and by how many nats the other one is preferred."""

    position: int
    gap: float


class ReplyComparison(TypedDict):
    """A reply of the merged model, and whether base + adapter reply alike; gaps up to counts_as_tied are no fault."""

    reply: str
    same: bool
    tied: NearTie | None
    counts_as_tied: float


class ReloadedReply(ReplyComparison):
    """The same of a fresh process: to which prompt, and in which dtype it computed."""

    prompt: str
    dtype: str


class LogitComparison(LogitDifferences):
    """The predictions, how the weights were held for them, and the reply."""

    loading: LoadingRecord
    reloaded: ReloadedReply


class MergeProof(WeightCheck):
    """proof.json of a merged adapter. What predictions tell is absent without held-out rows (`checked` is false)."""

    tolerance: float
    tolerance_reason: str
    checked: bool
    rows: int
    base: BaseRecord | None
    reason: str
    reloaded: ReloadedReply | None
    positions: NotRequired[int]
    max_difference: NotRequired[float]
    mean_difference: NotRequired[float]
    top_token_agreement: NotRequired[float]
    kl: NotRequired[float]
    kl_median: NotRequired[float]
    base_kl: NotRequired[float]
    applied: NotRequired[float | None]
    heldout_loss: NotRequired[HeldoutLosses]
    loading: NotRequired[LoadingRecord]


class FullProof(TypedDict):
    """proof.json of a full training, which there is nothing to merge of."""

    checked: bool
    method: Literal["full"]
    reason: str


ProofRecord = MergeProof | FullProof
