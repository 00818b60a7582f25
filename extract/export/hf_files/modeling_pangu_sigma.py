"""PanGu-Σ in PyTorch: PanGu-α's decoder whose top layers are expert groups, one group a domain.

Blocks are pre-LN. After the backbone's norm comes the query layer, whose attention queries are rows of a table of next
positions. Logits are tied to the word embedding. Positions and attention restart after every end-of-document token. In
a sparse layer every domain has a group of experts; inside it a fixed table leads each vocabulary id to its expert
(Random Routed Experts, arXiv 2303.10845), or a learned top-1 gate chooses among all experts (Switch, arXiv 2101.03961).

This file and its configuration file need nothing but torch and transformers.

Legend: B samples, S new positions, K positions with the cached ones, T = B*S rows, D hidden width, H heads, W = D/H,
F inner width, V vocabulary, E experts of a group.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_pangu_sigma import PanGuSigmaConfig

MASKED_SCORE = -10000.0  # PanGu-α's value: its exponential is 0 in float32, and rows without any key stay finite


def rows_by_number(numbers, count, of):
    """`of(n, rows)` [N, …] for the rows that have number n, put together in the order of `numbers` [T].

    `rows` is an index of the first axis. In a graph that is traced all `count` numbers may occur, whatever its example.
    """
    if count == 1:
        return of(0, slice(None))
    occurring = range(count) if torch.jit.is_tracing() else numbers.unique().tolist()
    if len(occurring) == 1:
        return of(occurring[0], slice(None))
    rows = [(numbers == n).nonzero().squeeze(1) for n in occurring]
    parts = torch.cat([of(n, mine) for n, mine in zip(occurring, rows, strict=True)])
    return parts.index_put((torch.cat(rows),), parts)


def _activate(kind, x):
    """FastGELU x * sigmoid(1.702 x), or GELU's tanh form."""
    if kind == "fast_gelu":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh")


class PanGuSigmaAttention(nn.Module):
    """Causal attention with biases; in the query layer the queries come from another table than keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer
        self.heads = config.num_attention_heads
        self.width = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, queries, x, mask, cache, cache_position, output_attentions):
        """queries, x [T, D], additive mask [B, 1, S, K] -> (y [T, D], probabilities [B, H, S, K] or None)."""
        q, k, v = (
            part(rows).view(mask.shape[0], -1, self.heads, self.width).transpose(1, 2)
            for part, rows in ((self.query, queries), (self.key, x), (self.value, x))
        )
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": cache_position})
        probabilities = None
        if output_attentions or self.config._attn_implementation == "eager":
            scores = q @ k.transpose(2, 3) / math.sqrt(self.width) + mask
            probabilities = torch.softmax(scores.float(), -1).to(q.dtype)
            y = probabilities @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.projection(y.transpose(1, 2).reshape(x.shape))
        return y, probabilities if output_attentions else None


class PanGuSigmaFeedForward(nn.Module):
    """The feed-forward network of a dense layer."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation_function
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x, tokens, domain):
        return self.down(_activate(self.activation, self.up(x)))


class PanGuSigmaExpertGroup(nn.Module):
    """One domain's experts in one layer, and with random routing their table: vocabulary id -> expert."""

    def __init__(self, config, experts):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = config.activation_function
        self.up_weight = nn.Parameter(torch.empty(experts, hidden, inner))
        self.up_bias = nn.Parameter(torch.empty(experts, inner))
        self.down_weight = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_bias = nn.Parameter(torch.empty(experts, hidden))
        if config.router == "rre":
            self.register_buffer("routing", torch.arange(config.vocab_size, dtype=torch.int32) % experts)

    def forward(self, x, expert):
        """Rows x [N, D] of one expert -> [N, D]."""
        inner = _activate(self.activation, torch.addmm(self.up_bias[expert], x, self.up_weight[expert]))
        return torch.addmm(self.down_bias[expert], inner, self.down_weight[expert])


class PanGuSigmaSparseFeedForward(nn.Module):
    """A layer of experts, numbered through all groups. Nothing is ever dropped."""

    def __init__(self, config):
        super().__init__()
        self.groups = nn.ModuleList(PanGuSigmaExpertGroup(config, experts) for experts in config.experts)
        self.places = [(group, expert) for group, experts in enumerate(config.experts) for expert in range(experts)]
        self.first = [self.places.index((group, 0)) for group in range(len(config.experts))]
        self.learned = config.router == "switch"
        if self.learned:
            self.router = nn.Linear(config.hidden_size, sum(config.experts), bias=False)

    def forward(self, x, tokens, domain):
        """Rows x [T, D], the token and the domain of each [T] -> [T, D]."""
        if self.learned:
            # The gate's probabilities in float32, as the paper has them.
            probabilities = torch.softmax(functional.linear(x.float(), self.router.weight.float()), -1)
            weight, numbers = probabilities.max(-1)
            return self.experts(x, numbers) * weight[:, None].to(x.dtype)
        numbers = rows_by_number(
            domain, len(self.groups), lambda d, rows: self.groups[d].routing[tokens[rows]] + self.first[d]
        )
        return self.experts(x, numbers)

    def experts(self, x, numbers):
        """Rows x [T, D], the expert of each [T] -> [T, D]."""

        def compute(number, rows):
            group, expert = self.places[number]
            return self.groups[group](x[rows], expert)

        return rows_by_number(numbers, len(self.places), compute)


class PanGuSigmaLayer(nn.Module):
    """h + Attention(norm1 h), then h + FeedForward(norm2 h)."""

    def __init__(self, config, layer, name):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attention = PanGuSigmaAttention(config, layer)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        sparse = name in config.sparse_layers
        self.feed_forward = PanGuSigmaSparseFeedForward(config) if sparse else PanGuSigmaFeedForward(config)

    def forward(self, h, queries, mask, tokens, domain, cache, cache_position, output_attentions):
        """Rows h [T, D]; queries [T, D] or None: the layer's own -> (h [T, D], probabilities or None)."""
        x = self.norm1(h)
        queries = x if queries is None else queries
        y, attention = self.attention(queries, x, mask, cache, cache_position, output_attentions)
        h = h + y
        return h + self.feed_forward(self.norm2(h), tokens, domain), attention


class PanGuSigmaPreTrainedModel(PreTrainedModel):
    config_class = PanGuSigmaConfig
    base_model_prefix = "model"
    _no_split_modules = ["PanGuSigmaLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, std)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.zero_()
        elif isinstance(module, PanGuSigmaExpertGroup):
            module.up_weight.data.normal_(0.0, std)
            module.down_weight.data.normal_(0.0, std / math.sqrt(2.0 * self.config.num_hidden_layers))
            module.up_bias.data.zero_()
            module.down_bias.data.zero_()


class PanGuSigmaModel(PanGuSigmaPreTrainedModel):
    """The network without its head."""

    def __init__(self, config):
        super().__init__(config)
        slots = len(config.domains) if config.embedding_slots == "per_domain" else 1
        self.words = nn.ModuleList(nn.Embedding(config.vocab_size, config.hidden_size) for _ in range(slots))
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        blocks = config.num_hidden_layers - int(config.query_layer)
        self.blocks = nn.ModuleList(PanGuSigmaLayer(config, i, f"blocks.{i}") for i in range(blocks))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        if config.query_layer:
            self.next_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.query_layer = PanGuSigmaLayer(config, blocks, "query_layer")
        self.post_init()

    def get_input_embeddings(self):
        return self.words[0] if len(self.words) == 1 else None

    def set_input_embeddings(self, value):
        if len(self.words) != 1:
            raise NotImplementedError("each domain has a word embedding of its own: set model.words[i]")
        self.words[0] = value

    def documents(self, tokens, real, first):
        """tokens and real (0 for padding) [B, S], document of each row's first token [B, 1] or a number -> document
        of every token, and of the one that follows it [B, S]. They count from 1 in a row; padding has 0."""
        ended = real * (tokens == self.config.eos_token_id)
        following = first + ended.cumsum(1)
        return (following - ended) * real, following

    def positions_and_visible(self, own, of_keys, cache_position):
        """Documents of new tokens [B, S] and of all keys [B, K], places of the new ones among these [S] -> positions
        [B, S], and the keys that each sees [B, S, K]: those of its document up to itself, which its position counts."""
        places = torch.arange(of_keys.shape[1], device=own.device)
        visible = (of_keys[:, None, :] == own[:, :, None]) & (of_keys[:, None, :] > 0)
        visible = visible & (places[None, :] <= cache_position[:, None])
        return (visible.sum(-1) - 1).clamp(min=0), visible

    def run(self, tokens, domain, positions, visible, cache, cache_position, output_attentions=False):
        """tokens [B, S], domain numbers [B], positions [B, S], visible [B, S, K] -> rows [T, D] that each layer takes
        and the last one gives; attention probabilities of the layers."""
        domain = domain[:, None].expand_as(tokens).flatten()
        tokens, positions = tokens.flatten(), positions.flatten()
        h = rows_by_number(domain, len(self.words), lambda d, rows: self.words[d](tokens[rows]))
        h = h + self.positions(positions)
        mask = torch.zeros(visible.shape, dtype=h.dtype, device=h.device).masked_fill(~visible, MASKED_SCORE)[:, None]
        states, attentions = (), ()
        layers = [(block, None) for block in self.blocks]
        if self.config.query_layer:
            layers.append((self.query_layer, self.next_positions(positions)))
        for layer, queries in layers:
            if queries is not None:
                h = self.norm(h)
            states += (h,)
            h, attention = layer(h, queries, mask, tokens, domain, cache, cache_position, output_attentions)
            attentions += (attention,)
        return (*states, h if self.config.query_layer else self.norm(h)), attentions

    def logits(self, h, domain):
        """h [B, S, D] -> [B, S, V] by the word table of each sample."""
        numbers, tables = domain, self.words
        if len(tables) > 1 and not torch.jit.is_tracing():
            # A product for each sample: another number of rows may be rounded otherwise.
            numbers, tables = torch.arange(len(domain), device=domain.device), [self.words[d] for d in domain.tolist()]
        return rows_by_number(numbers, len(tables), lambda n, rows: functional.linear(h[rows], tables[n].weight))

    def domain_numbers(self, domain, batch, device):
        """A domain's name or number, or one for each sample -> int64 [B]. ValueError for one that is not there."""
        names = self.config.domains
        given = self.config.domain if domain is None else domain
        if isinstance(given, torch.Tensor):
            numbers = given.to(device=device, dtype=torch.long).reshape(-1)
        else:
            listed = [given] if isinstance(given, str | int) else list(given)
            unknown = [d for d in listed if isinstance(d, str) and d not in names]
            if unknown:
                raise ValueError(f"the model has no domain {unknown[0]!r}; it has {', '.join(names)}")
            listed = [names.index(d) if isinstance(d, str) else int(d) for d in listed]
            numbers = torch.tensor(listed, dtype=torch.long, device=device)
        if numbers.numel() == 1:
            numbers = numbers.expand(batch)
        if numbers.numel() != batch:
            raise ValueError(f"{numbers.numel()} domains for {batch} samples: give one, or one for each sample")
        if not 0 <= int(numbers.min()) <= int(numbers.max()) < len(names):
            raise ValueError(f"domain numbers go from 0 to {len(names) - 1} ({', '.join(names)})")
        return numbers

    def forward(
        self,
        input_ids,
        attention_mask=None,
        domain=None,
        past_key_values=None,
        use_cache=None,
        cache_position=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """input_ids [B, S]; attention_mask [B, S] or [B, K], 0 for padding; domain as `domain_numbers` takes it.

        Positions follow from the tokens: they count from 0 in every document and skip padding.
        """
        batch, length = input_ids.shape
        device = input_ids.device
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache = past_key_values
        past = 0 if cache is None else int(cache.get_seq_length())
        if cache_position is None:
            cache_position = torch.arange(past, past + length, device=device)
        real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask[:, -length:] != 0).long()
        domain = self.domain_numbers(domain, batch, device)
        # The documents of cached tokens, and of what follows each, lie in the cache as one more layer, so that they are
        # reordered, repeated and cropped together with keys and values; 0 stands in places that are not filled yet.
        layer = self.config.num_hidden_layers
        first = cache.layers[layer].values[:, 0, past - 1] if past > 0 else 1
        own, following = self.documents(input_ids, real, first)
        of_keys = own
        if cache is not None:
            marks = own[:, None, :, None], following[:, None, :, None]
            of_keys = cache.update(*marks, layer, {"cache_position": cache_position})[0][:, 0, :, 0]
        positions, visible = self.positions_and_visible(own, of_keys, cache_position)
        most = self.config.max_position_embeddings
        if past + length > most and int(positions.max()) >= most:
            raise ValueError(f"a document is longer than the model's {most} positions; shorten the text")
        states, attentions = self.run(input_ids, domain, positions, visible, cache, cache_position, output_attentions)
        states = tuple(h.view(batch, length, -1) for h in states)
        output = BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class PanGuSigmaNoPiece(LogitsProcessor):
    """Logits that are minus infinity at the ids that the tokenizer has no piece for; losses keep them as trained."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.tensor(self.ids, device=scores.device), -math.inf)


class PanGuSigmaForCausalLM(PanGuSigmaPreTrainedModel, GenerationMixin):
    """The language model. Which domain's experts answer: `domain=` of a call, else `model.domain`."""

    def __init__(self, config):
        super().__init__(config)
        self.model = PanGuSigmaModel(config)
        self.post_init()

    @property
    def domain(self):
        """The domain that answers where a call names none; also kept in the configuration."""
        return self.config.domain

    @domain.setter
    def domain(self, name):
        if name not in self.config.domains:
            raise ValueError(f"the model has no domain {name!r}; it has {', '.join(self.config.domains)}")
        self.config.domain = name

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return None  # the head is the word embedding itself

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(
            "routing tables have one entry for each vocabulary id: extend the vocabulary before exporting"
        )

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        return attention_mask  # the model makes its own mask, by documents

    def generate(self, inputs=None, *args, domain=None, **kwargs):
        """transformers' `generate`; `domain` names one domain, or one for each prompt."""
        if domain is not None:
            if isinstance(domain, list | tuple):
                # As a tensor it is repeated together with the prompts, for beams for example.
                domain = self.model.domain_numbers(domain, len(domain), self.device)
            kwargs["domain"] = domain
        return super().generate(inputs, *args, **kwargs)

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.ids_without_piece:
            # First: what top-k and its like leave must be ids that can be written.
            processors.insert(0, PanGuSigmaNoPiece(self.config.ids_without_piece))
        return processors

    def forward(
        self,
        input_ids,
        attention_mask=None,
        domain=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        cache_position=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        inputs_embeds=None,
    ):
        """As the model's; `labels` [B, S] (-100: not counted) give the loss, `logits_to_keep` the last logits only."""
        if inputs_embeds is not None:
            raise ValueError("experts and document ends follow from token ids: give input_ids, not inputs_embeds")
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        domain = self.model.domain_numbers(domain, len(input_ids), input_ids.device)
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            domain=domain,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cache_position=cache_position,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        h = output.last_hidden_state
        h = h[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else h[:, logits_to_keep]
        logits = self.model.logits(h, domain)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if return_dict else result.to_tuple()
