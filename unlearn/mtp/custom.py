"""``model.generate(…, custom_generate=…)``: transformers' own call, with drafts."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unlearn.errors import UserError
from unlearn.head import plain
from unlearn.mtp.decode import Choose, Drafting, decode, greedy
from unlearn.mtp.predictor import MaskPredictor

STATELESS = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
)
"""Changes of the logits that depend on nothing but the logits."""
UNTOUCHED = ("attention_mask", "past_key_values", "use_cache", "cache_position", "position_ids",
             "logits_to_keep", "synced_gpus")  # fmt: skip


def custom_generate(
    predictor: MaskPredictor, drafting: Drafting | None = None
) -> Callable[..., Int[Tensor, "1 token"]]:
    """Give what ``model.generate(ids, custom_generate=…)`` calls to write with drafts.

    Greedy and sampled decoding of one prompt, with temperature, top-k, top-p, min-p and the like;
    any stopping criteria. The text, or its distribution, is that of plain ``generate``.

    Raises (when called):
        UserError: another model than the predictor's, several prompts, penalties that depend on
            the text, a cache that is in use.
    """
    drafting = drafting or Drafting()

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **given: Any,
    ) -> Tensor:
        _require_own(model, predictor)
        _check_call(input_ids, logits_processor or (), generation_config, given)
        prompt = input_ids[0].tolist()
        most = generation_config.max_length - len(prompt)

        def ended(tokens: list[int]) -> bool:
            so_far = torch.tensor([prompt + tokens], device=input_ids.device)
            return bool(stopping_criteria(so_far, None).all()) if stopping_criteria else False

        choose = _choice(input_ids, logits_processor, sample=generation_config.do_sample)
        found = decode(
            predictor, prompt, max_new_tokens=most, drafting=drafting, choose=choose, ended=ended
        )
        written = torch.tensor([found.tokens], device=input_ids.device, dtype=input_ids.dtype)
        return torch.cat([input_ids, written], 1)

    return generate


def _choice(input_ids: Tensor, warpers: Any, *, sample: bool) -> Choose:
    if not sample:
        return greedy

    def draw(logits: Tensor) -> Tensor:
        texts = input_ids.expand(
            len(logits), -1
        )  # of the right shape; none of the warpers reads it
        warped = warpers(texts, logits) if warpers else logits
        return torch.multinomial(warped.softmax(-1), 1)[:, 0]

    return draw


def _require_own(model: Any, predictor: MaskPredictor) -> None:
    """Refuse a model whose weights are not, in memory, those that the predictor sits beside.

    Raises:
        UserError: as said.
    """
    own = plain(model)
    if own is predictor.model:
        return
    places = [{name: one.data_ptr() for name, one in each.named_parameters()}
              for each in (own, predictor.model)]  # fmt: skip
    if places[0] != places[1]:
        raise UserError(
            "this is not the model that the predictor sits beside, whose text would be written",
            "call predictor.model.generate(…), or load_predictor(folder, base, model=this one)",
        )


def _check_call(input_ids: Tensor, processors: Any, generation: Any, given: Any) -> None:
    """Refuse what would not be exact, or is not done.

    Raises:
        UserError: as said.
    """
    if (generation.num_beams or 1) > 1:
        raise UserError(
            f"num_beams={generation.num_beams} given; beams are not made", "leave num_beams out"
        )
    if len(input_ids) != 1 or generation.num_return_sequences not in (None, 1):
        raise UserError(
            f"{len(input_ids)} sequences given; drafts are made for one at a time",
            "call generate once per prompt, with num_return_sequences=1",
        )
    odd = [type(one).__name__ for one in processors if type(one).__name__ not in STATELESS]
    if odd:
        raise UserError(
            f"{odd[0]} changes the logits by what was written, which drafts do not follow",
            f"leave it out; known: {', '.join(STATELESS)}",
        )
    cache = given.get("past_key_values")
    if cache is not None and (cache.get_seq_length() or not _grows(cache)):
        raise UserError(
            f"a {type(cache).__name__} given: drafts need a cache of their own, which is cut back",
            "leave past_key_values and cache_implementation out",
        )
    mask = given.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise UserError("a padded prompt given", "give the prompt without padding")
    if generation.return_dict_in_generate:
        message = "dictionaries of scores are not made"
        raise UserError(message, "leave return_dict_in_generate out")
    more = sorted(key for key, value in given.items() if key not in UNTOUCHED and value is not None)
    if more:
        raise UserError(f"{', '.join(more)} given, which drafts do not know", "leave it out")


def _grows(cache: Any) -> bool:
    return type(cache).__name__ == "DynamicCache"
