"""config.json of an OLMoE: every key is used, changes nothing (and is listed here with its reason), or is refused.

Source: transformers 4.57 and 5, `configuration_olmoe.py`, `configuration_utils.py` and `modeling_olmoe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pangu_sigma.convert.olmoe_names import MODEL_TYPE
from pangu_sigma.errors import UserError
from pangu_sigma.json_reader import UnreadableText, read_object
from pangu_sigma.wording import listed, nearest, shown

# Read by `OlmoeConfigFile` and the import.
USED = frozenset(
    {
        "model_type", "vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
        "num_experts", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "rope_parameters", "rope_scaling", "tie_word_embeddings", "initializer_range", "norm_topk_prob",
        "router_aux_loss_coef", "eos_token_id",
    }
)  # fmt: skip
# Keys of which only these values are the function that our model has. What stands first is transformers' default.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "clip_qkv": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "prefix": (None, ""),
}
# Keys that change nothing of what the model computes, whatever they hold, by the reason why.
NEUTRAL: Mapping[str, frozenset[str]] = {
    reason: frozenset(keys.split())
    for reason, keys in {
        "what a call of the model gives beside the logits": (
            "use_cache output_router_logits output_attentions output_hidden_states return_dict use_return_dict"
        ),
        "how the same function is computed": (
            "torchscript chunk_size_feed_forward tf_legacy_loss use_bfloat16 attn_implementation _attn_implementation "
            "_attn_implementation_internal _attn_implementation_autoset experts_implementation "
            "_experts_implementation is_decoder"
        ),
        "the tensors say it themselves": "architectures dtype torch_dtype",
        "where the file comes from": "transformers_version _name_or_path name_or_path _commit_hash",
        "of tasks other than writing text": (
            "id2label label2id num_labels problem_type finetuning_task task_specific_params sep_token_id "
            "decoder_start_token_id"
        ),
        "the tokenizer's, which has files of its own": "tokenizer_class bos_token_id pad_token_id",
        "defaults of sampling, which every request chooses": (
            "max_length min_length max_new_tokens do_sample early_stopping num_beams temperature top_k top_p typical_p "
            "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
            "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
            "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
            "num_beam_groups diversity_penalty"
        ),
    }.items()
}
# What a mapping of RoPE may say beside its base; `type` is the spelling of old files.
_DEFAULT_ROPE: Mapping[str, tuple[Any, ...]] = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "factor": (1.0, None),
    "partial_rotary_factor": (1.0, None),
}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of an OLMoE. UserError for another model, and for a key that this model has no answer to."""
    try:
        given = read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: give the folder that save_pretrained wrote") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fetch the folder again") from error
    except UnreadableText as error:
        raise UserError(f"{error.at(path)}: fetch the folder again") from error
    kind = given.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{path} is a model of type {shown(kind)}: only olmoe (OlmoeForCausalLM) is taken over")
    heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
    width = hidden // heads if type(heads) is type(hidden) is int and heads > 0 else None
    only = {**ONLY, "num_key_value_heads": (heads, None), "head_dim": (width, None)}
    for key, allowed in only.items():
        if key in given and not any(_is_same(given[key], value) for value in allowed):
            raise UserError(
                f"{path} says {key} = {shown(given[key])}, which this model does not have: only {shown(allowed[0])} is "
                "taken over"
            )
    known = USED.union(only, *NEUTRAL.values())
    # What is null is left out, in any version of transformers.
    if unknown := [key for key, value in given.items() if key not in known and value is not None]:
        near = nearest(unknown[0], known) if len(unknown) == 1 else None
        raise UserError(
            f"{path} has {listed(unknown)}, of which nobody knows here whether it changes what the model computes"
            f"{f' (did you mean {near}?)' if near else ''}: take it out of the file if it does not"
        )
    return given


def _is_same(one: Any, other: Any) -> bool:
    """Equality in which 1 is not true, as it is in Python."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class OlmoeConfigFile:
    """The fields of a config.json, each read as the kind of value that it must be. Raises UserError naming the key.

    tensors: how many the folder has.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, tensors: int) -> None:
        self.values, self.path, self.tensors = values, path, tensors

    def parts(self, key: str, default: int | None = None) -> int:
        """A count of what has at least one tensor of its own each."""
        parts = self.count(key, default)
        if parts > self.tensors:
            raise UserError(
                f"{self.path} says {key} = {parts}, and the folder has {self.tensors} tensors: fetch the folder again"
            )
        return parts

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; required where there is no default."""
        return self._checked(key, default, lambda value: type(value) is int and value >= 1, "a whole number from 1 on")

    def number(self, key: str, default: float) -> float:
        """A number of at least 0."""
        return float(
            self._checked(key, default, lambda value: type(value) in (int, float) and value >= 0, "a number from 0 on")
        )

    def flag(self, key: str) -> bool:
        """True or false; false where it is left out."""
        return self._checked(key, False, lambda value: isinstance(value, bool), "true or false")

    def rope_theta(self) -> float:
        """The base of RoPE: its own key, or that of transformers 5's mapping of all that RoPE has."""
        bases = {"rope_theta": self.number("rope_theta", 10000.0)} if "rope_theta" in self.values else {}
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.values.get(key)
            if rope is None:
                continue
            self._check_rope(key, rope)
            if "rope_theta" in rope:
                inner = OlmoeConfigFile({f"{key}.rope_theta": rope["rope_theta"]}, self.path, self.tensors)
                bases[f"{key}.rope_theta"] = inner.number(f"{key}.rope_theta", 10000.0)
        if len(set(bases.values())) > 1:
            said = " and ".join(f"{key} = {shown(value)}" for key, value in bases.items())
            raise UserError(f"{self.path} says {said}, which contradict each other: leave the right one")
        return next(iter(bases.values()), 10000.0)

    def _check_rope(self, key: str, rope: Any) -> None:
        """Refuse any RoPE but the default one, which a mapping may name without changing anything."""
        if not isinstance(rope, dict) or not all(
            name == "rope_theta" or value in _DEFAULT_ROPE.get(name, (None,)) for name, value in rope.items()
        ):
            raise UserError(
                f"{self.path} says {key} = {shown(rope)}, which this model does not have: only rope_type default is "
                "taken over"
            )

    def _checked(self, key: str, default: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        value = self.values.get(key, default)
        if key not in self.values and default is None:
            raise UserError(f"{self.path} lacks {key}: fetch the folder again")
        if not fits(value):
            raise UserError(f"{self.path} says {key} = {shown(value)}, which is not {kind}: fetch the folder again")
        return value
