"""Configuration of an exported PanGu-Σ model."""

from transformers import PretrainedConfig


class PanGuSigmaConfig(PretrainedConfig):
    """Sizes and parts of the network; keys that other models have too carry transformers' usual names.

    `num_hidden_layers` counts the query layer. `sparse_layers` names the layers made of experts (`blocks.6`, …,
    `query_layer`); `domains` the domains in the order of their numbers, `experts` the size of each one's group in every
    sparse layer. `domain` is the domain whose experts answer where a call names none. `ids_without_piece`: vocabulary
    ids that the tokenizer has no piece for, so that none is ever generated.
    """

    model_type = "pangu_sigma"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=40000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=1024,
        activation_function="fast_gelu",
        layer_norm_epsilon=1e-5,
        query_layer=True,
        sparse_layers=(),
        router="rre",
        domains=("text",),
        experts=(1,),
        domain=None,
        embedding_slots="shared",
        initializer_range=0.02,
        use_cache=True,
        ids_without_piece=(),
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.activation_function = activation_function
        self.layer_norm_epsilon = layer_norm_epsilon
        self.query_layer = query_layer
        self.sparse_layers = list(sparse_layers)
        self.router = router
        self.domains = list(domains)
        self.experts = list(experts)
        self.domain = self.domains[0] if domain is None else domain
        self.embedding_slots = embedding_slots
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.ids_without_piece = list(ids_without_piece)
        super().__init__(**kwargs)
        if self.domain not in self.domains:
            raise ValueError(f"the default domain {self.domain!r} is none of {', '.join(self.domains)}")
        if len(self.experts) != len(self.domains):
            raise ValueError(f"{len(self.domains)} domains need {len(self.domains)} group sizes, not {self.experts}")

    @property
    def layer_types(self):
        """One entry for each layer of a cache: the attention layers, and one more that holds where documents begin."""
        return ["full_attention"] * (self.num_hidden_layers + 1)
