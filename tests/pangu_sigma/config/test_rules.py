"""Rules between keys: each broken one is named, each border case passes."""

from __future__ import annotations

import pytest

from pangu_sigma.errors import UserError

SPARSE = "model.sparse.layers=1"

MIXTURE = "model.top_layer=mixture"
ROPE = ["model.position=rope", "model.query_layer=none"]
BROKEN = [
    ("model.heads does not divide", ["model.heads=3"], "model.heads = 3 does not divide model.hidden = 128"),
    ("no block under the query layer", ["model.layers=1"], "leaves no block"),
    ("more sparse layers than blocks", ["model.sparse.layers=4"], "more than the 3 layers that can be sparse"),
    (
        "more than with the query layer",
        ["model.sparse={layers: 5, include_query_layer: true}"],
        "more than the 4 layers that can be sparse (model.layers = 4, the query layer included)",
    ),
    (
        "more than without one",
        ["model.sparse.layers=5", "model.query_layer=none"],
        "(model.layers = 4, there is no query layer): set it to at most 4",
    ),
    (
        "sparse query layer without one",
        ["model.sparse={layers: 1, include_query_layer: true}", "model.query_layer=none"],
        "model.query_layer is none",
    ),
    ("sparse query layer of none", ["model.sparse.include_query_layer=true"], "model.sparse.layers is 0"),
    ("resample without a table", ["model.sparse={layers: 1, router: switch, resample: true}"], "has no table"),
    ("jitter without a gate", ["model.sparse={layers: 1, jitter: 0.1}"], "has no effect on the router rre"),
    (
        "layers beside a pattern",
        ["model.sparse={layers: 1, pattern: every}"],
        "set model.sparse.layers to 0, or the pattern to top",
    ),
    ("every other of one", ["model.layers=2", "model.sparse.pattern=every_other"], "begins with the second block"),
    ("jitter elsewhere", ["model.sparse={layers: 1, router: gshard, jitter: 0.1}"], "no effect on the router gshard"),
    ("renormalise elsewhere", ["model.sparse={layers: 1, renormalise: true}"], "no effect on the router rre"),
    ("k of a top-2 gate", ["model.sparse={layers: 1, router: glam, top_k: 4}"], "takes 2 by definition"),
    (
        "capacity of expert choice",
        ["model.sparse={layers: 1, router: expert_choice, dispatch: capacity}"],
        "every expert takes a fixed number",
    ),
    (
        "capacity of a mixture",
        [MIXTURE, "model.sparse.dispatch=capacity"],
        "every expert takes every row: set it to dropless",
    ),
    (
        "a mixture over sparse layers",
        [MIXTURE, "model.sparse.layers=2"],
        "(query_layer) must be the only one with experts",
    ),
    (
        "a mixture and a sparse query layer",
        [MIXTURE, "model.sparse={layers: 1, include_query_layer: true}"],
        "leave model.sparse.layers, pattern and include_query_layer out",
    ),
    (
        "a mixture over a sparse layer of every kind",
        [MIXTURE, "model.sparse.pattern=every", "model.query_layer=none"],
        "(blocks.3) must be the only one with experts",
    ),
    ("a mixture with a router", [MIXTURE, "model.sparse.router=switch"], "whose gate is its own: leave it out"),
    ("a mixture that resamples", [MIXTURE, "model.sparse.resample=true"], "the mixture (model.top_layer) has no table"),
    ("k of a mixture", [MIXTURE, "model.sparse.top_k=2"], "takes all experts by definition"),
    (
        "a mixture without its experts",
        [MIXTURE, "experts.store=host"],
        "set experts.store to device",
    ),
    ("a table's group", ["model.sparse={layers: 1, dispatch: capacity, capacity_samples: 2}"], "acts on the learned"),
    (
        "a group that does not divide",
        ["model.sparse={layers: 1, router: switch, dispatch: capacity, capacity_samples: 3}", "train.batch_size=8"],
        "does not divide the 8 sequences that a rank computes at a time",
    ),
    ("mixture_loss elsewhere", ["model.mixture_loss=cooperative"], "no effect without a mixture"),
    ("k over experts", ["model.sparse={layers: 1, router: olmoe, top_k: 99}"], "is too many for the"),
    ("noisy k of all", ["model.sparse={layers: 1, router: noisy_top_k, top_k: 6}"], "one of which must be left"),
    (
        "gate without its experts",
        ["model.sparse={layers: 1, router: gshard}", "experts.store=host"],
        "model.sparse.router = gshard",
    ),
    ("hash over vocabulary", ["model.sparse={layers: 1, router: hash}", "domains.0.experts=4096"], "table of a hash"),
    ("group over vocabulary", ["model.sparse.layers=1", "domains.0.experts=5000"], "more than the 4096 vocabulary ids"),
    ("name twice", ["domains.1.name=code"], "domains.1.name = code is the name of an earlier domain"),
    ("reserved name", ["domains.1.name=shared"], "domains.1.name = shared is reserved"),
    ("name of inference", ["domains.1.name=auto"], "domains.1.name = auto is reserved: domain='auto' has"),
    ("name of a numbered file", ["domains.1.name=x-00001-of-00002"], "ends like a numbered file"),
    ("infinite weight", ["domains.0.weight=1e308", "domains.1.weight=1e308"], "must be a number of at most 1e+36"),
    ("infinite weight of a phase", ["train.phases=[{weights: {code: 1e308}}]"], "must be a number of at most 1e+36"),
    ("beyond 64 bits", ["model.layers=9223372036854775808"], "must be a number of at most 9223372036854775807"),
    ("no weight", ["domains.0.weight=0", "domains.1.weight=0"], "domains have weights that do not add up"),
    ("domains per step", ["data.max_domains_per_batch=3"], "more than the 2 domains there are"),
    ("path of a trained tokenizer", ["data.tokenizer.path=x"], "data.tokenizer.kind is train"),
    ("no path of a given one", ["data.tokenizer.kind=sentencepiece"], "needs the tokenizer's model file"),
    ("vocabulary too small", ["model.vocab_size=4095"], "less than the tokenizer's 4096 pieces"),
    (
        "vocabulary too small for pangu_alpha",
        ["data.tokenizer={kind: pangu_alpha, path: x}", "model.vocab_size=39999"],
        "less than the tokenizer's 40000 pieces",
    ),
    ("sequence over positions", ["data.sequence_length=257"], "more than model.positions = 256"),
    (
        "evaluation of nothing",
        ["data.heldout_fraction=0", "evaluate.every=1"],
        "evaluate.every = 1 needs held-out text",
    ),
    ("probe of nothing", ["data.heldout_fraction=0"], "checkpoint.probe_sequences = 2 needs held-out text"),
    ("warm-up over steps", ["schedule.warmup_steps=11"], "more than train.steps = 10"),
    ("decay inside the warm-up", ["schedule={warmup_steps: 5, decay_steps: 4}"], "less than schedule.warmup_steps = 5"),
    ("accumulation", ["train.gradient_accumulation_steps=3"], "does not divide train.batch_size = 4"),
    ("stop after the end", ["train.stop_at=11"], "more than train.steps = 10"),
    ("bfloat16 on CPU", ["train.precision=bfloat16"], "does not run on run.device = CPU"),
    ("rollback to nothing", ["train.nonfinite=rollback", "checkpoint.every=0"], "checkpoint.every is 0"),
    ("profile after the end", ["run.profile={start: 9, steps: 3}"], "ends at step 11, after train.steps = 10"),
    ("phases too short", ["train.phases=[{steps: 4}, {steps: 5}]"], "add up to 9 steps and train.steps is 10"),
    ("phases too long", ["train.phases=[{steps: 10}, {}]"], "leave at least one step for the last phase"),
    ("open phase in the middle", ["train.phases=[{}, {steps: 5}]"], "only the last phase may leave it out"),
    ("weights of a stranger", ["train.phases=[{weights: {law: 1}}]"], "the known ones are code, docs"),
    ("experts of a stranger", ["train.phases=[{domains: [law]}]"], "names the domain law"),
    ("negative weight", ["train.phases=[{weights: {code: -1, docs: 2}}]"], "weights.code = -1.0 is negative"),
    ("no weight in a phase", ["train.phases=[{weights: {code: 0}}]"], "give at least one domain a positive weight"),
    ("empty weights in a phase", ["train.phases=[{weights: {}}]"], "give at least one domain a positive weight"),
    ("phase that trains nothing", ["train.phases=[{shared: false, domains: []}]"], "trains nothing"),
    ("frozen dense model", ["train.phases=[{shared: false}]"], "a dense model has shared parameters only"),
    ("regularised by nothing", ["train.phases=[{shared: regularised}]"], "give output, l2 or ewc a weight above 0"),
    ("regularise without effect", ["train.phases=[{regularise: {l2: 1}}]"], "train.phases.0.regularise has no effect"),
    ("replay of nobody", ["train.phases=[{weights: {code: 1}, replay: 0.1}]"], "no earlier phase draws another domain"),
    ("replay beside everything", ["train.phases=[{steps: 5}, {replay: 0.1}]"], "train.phases.1.weights is null"),
    (
        "replay that trains nothing",
        [SPARSE, "train.phases=[{weights: {code: 1}, domains: [code], old: [docs], replay: 0.1, shared: frozen}]"],
        "has no use where nothing of the old domains trains",
    ),
    ("old stranger", ["train.phases=[{old: [law], weights: {code: 1}, replay: 0.1}]"], "old names the domain law"),
    ("old without effect", ["train.phases=[{old: [code]}]"], "train.phases.0.old has no effect"),
    (
        "Fisher information of nobody",
        ["train.phases=[{shared: regularised, regularise: {ewc: 1}}]"],
        "train.phases.0.regularise.ewc needs old domains",
    ),
    (
        "through the old without outputs",
        [SPARSE, "train.phases=[{shared: regularised, regularise: {l2: 1, through: old}}]"],
        "says whose outputs are compared, and output is 0",
    ),
    (
        "through the old of a dense model",
        ["train.phases=[{shared: regularised, regularise: {output: 1, through: old}}]"],
        "in which no domain has experts of its own",
    ),
    (
        "through nobody",
        [SPARSE, "train.phases=[{shared: regularised, regularise: {output: 1, through: old}}]"],
        "train.phases.0.regularise.through = old needs old domains",
    ),
    ("stream of a stranger", ["data.stream={path: x, domain: law}"], "data.stream.domain names the domain law"),
    (
        "stream with a limit on domains",
        ["data.stream={path: x}", "data.max_domains_per_batch=1"],
        "the documents of data.stream come in their own order",
    ),
    (
        "stream of several processes",
        ["data.stream={path: x}", "parallel={data: 2, workers: 2}"],
        "data.stream is read by one process, and parallel describes 2 devices",
    ),
    (
        "regularised on devices",
        ["train.phases=[{shared: regularised, regularise: {l2: 1}}]", "parallel={data: 2}", "run.device=Ascend"],
        "train.phases.0.shared = regularised has no form that is cut over devices",
    ),
    (
        "through experts of another placement group",
        [
            SPARSE, "domains.0.experts=2", "parallel={expert: 2, placement: domain, placement_groups: 2, workers: 2}",
            "train.phases=[{steps: 1}, {shared: regularised, old: [code], regularise: {output: 1, through: old}}]",
        ],
        "train.phases.1.regularise.through = old has the new text read by other domains' experts",
    ),
    (
        "stream with replay",
        ["data.stream={path: x}", "train.phases=[{weights: {code: 1}, old: [docs], replay: 0.1}]"],
        "draws nothing from the domains' files",
    ),
    ("workers beside the mesh", ["parallel.workers=2"], "parallel.workers = 2 is not the mesh's size 1"),
    ("tensor parts on CPU", ["parallel.tensor=2"], "parallel.tensor = 2 needs run.device = Ascend"),
    ("optimizer parts on CPU", ["parallel.optimizer_parallel=true"], "= true needs run.device = Ascend"),
    ("expert parts of a dense model", ["parallel.expert=2"], "has no sparse layer: set it to 1 and parallel.data to 2"),
    ("expert parts", ["parallel.expert=4", SPARSE], "parallel.expert = 4 does not divide the 6 experts"),
    ("groups of nothing", ["parallel.placement_groups=2"], "parallel.placement_groups = 2 has no effect"),
    (
        "groups of nothing, whose capacity cannot be counted",
        ["parallel.placement_groups=2", "model.sparse={router: switch, dispatch: capacity, capacity_samples: 2}"],
        "parallel.placement_groups = 2 has no effect",
    ),
    (
        "groups that do not divide",
        ["parallel={expert: 2, placement: domain, placement_groups: 3}", SPARSE],
        "parallel.placement_groups = 3 does not divide expert = 2",
    ),
    (
        "a domain in two groups",
        ["parallel={expert: 2, placement: domain, placement_groups: 2}", SPARSE],
        "parallel.placement_groups = 2 cuts the domain code in two (a group has 3 of 6 experts)",
    ),
    (
        "domains per step and group",
        ["parallel={expert: 2, placement: domain, placement_groups: 2}", SPARSE, "domains.1.experts=4",
         "data.max_domains_per_batch=2"],
        "counts per placement group, and one of them has 1 domains",
    ),
    (
        "a group without text",
        ["parallel={expert: 2, placement: domain, placement_groups: 2}", SPARSE, "domains.1.experts=4",
         "train.phases=[{steps: 5, weights: {code: 1}}, {}]"],
        "parallel.placement = domain leaves the ranks that read docs without text",
    ),
    (
        "a router over all groups",
        ["parallel={expert: 2, placement: domain, placement_groups: 2}", "domains.1.experts=4",
         "model.sparse={layers: 1, router: switch}"],
        "model.sparse.router = switch sends them to all",
    ),
    ("batch over readers", ["parallel.data=3"], "which the 3 ranks that read"),
    ("measuring over readers", ["parallel.data=2", "evaluate.batch_size=3"], "choose a multiple of it"),
    ("no time to wait", ["parallel.timeout=0"], "parallel.timeout"),
    ("heads", ["run.device=Ascend", "parallel.tensor=3"], "parallel.tensor = 3 does not divide model.heads = 4"),
    (
        "stages",
        ["run.device=Ascend", "parallel.pipeline=3", "train.gradient_accumulation_steps=4"],
        "does not divide model.layers",
    ),
    ("waiting stages", ["run.device=Ascend", "parallel.pipeline=2"], "set it to at least parallel.pipeline = 2"),
    (
        "measuring between stages",
        ["run.device=Ascend", "parallel.pipeline=2", "train.gradient_accumulation_steps=2", "evaluate.every=5"],
        "evaluate.every = 5 measures between steps, for which pipeline stages have no graph",
    ),
    ("rows without parts", ["run.device=Ascend", "parallel.sequence_parallel=true"], "parallel.tensor is 1"),
    ("workers on Ascend", ["run.device=Ascend", "parallel.workers=2"], "msrun starts one process a device"),
    (
        "dropless on devices",
        ["run.device=Ascend", "parallel.expert=2", SPARSE],
        "model.sparse.dispatch = dropless has rows of changing number",
    ),
    ("queries of positions without a table", ["model.position=rope"], "set model.query_layer to none"),
    ("odd heads cannot turn", [*ROPE, "model.hidden=60", "model.heads=4"], "gives a head 15 values"),
    ("the wavelengths of no rotation", ["model.rope_theta=500000"], "model.rope_theta = 500000 has no effect"),
    ("a gate that is no GEGLU's", ["model.feed_forward=geglu", "model.biases=false"], "is gated by gelu by definition"),
    (
        "gated experts with biases",
        [SPARSE, "model.sparse.feed_forward=swiglu", "model.activation=silu"],
        "model.sparse.feed_forward = swiglu has none",
    ),
    (
        "two gates",
        ["model.sparse={layers: 1, feed_forward: geglu}", "model.feed_forward=swiglu", "model.biases=false"],
        "set them alike, or one of them to mlp",
    ),
    ("a gate that is no SwiGLU's", ["model.feed_forward=swiglu", "model.biases=false"], "gated by silu by definition"),
    ("a SwiGLU with biases", ["model.feed_forward=swiglu", "model.activation=silu"], "set model.biases to false"),
    ("a head for words of every domain", ["model.head=untied", "model.domain_parameters.embedding=own"], "one table"),
    ("a pooled loss of no gate", ["model.sparse={layers: 1, balance: pooled}"], "has no effect on the router rre"),
    ("an anneal inside the warm-up", ["schedule={warmup_steps: 6, anneal_steps: 5}"], "more than train.steps = 10"),
    (
        "an anneal after phases that restart",
        ["schedule.anneal_steps=2", "train.phases=[{steps: 5}, {steps: 5, restart: true}]"],
        "train.phases.*.restart",
    ),
]

FINE = [
    [*ROPE, "model.feed_forward=swiglu", "model.activation=silu", "model.biases=false", "model.rope_theta=500000"],
    ["model.norm=rmsnorm", "model.attention.qk_norm=true", "model.biases=false", "model.head=untied"],
    ["model.sparse={layers: 1, router: olmoe, top_k: 2, balance: pooled}"],
    [MIXTURE, "model.mixture_loss=cooperative", "model.sparse.shared_expert=true"],
    [MIXTURE, "model.query_layer=none"],
    ["model.feed_forward=geglu", "model.activation=gelu", "model.biases=false", "model.sparse.feed_forward=mlp"],
    ["schedule={warmup_steps: 5, anneal_steps: 5}"],
    ["model.sparse.layers=3"],
    ["model.sparse={layers: 4, include_query_layer: true}"],
    ["model.sparse.layers=4", "model.query_layer=none"],
    ["model.layers=1", "model.query_layer=none"],
    ["data.sequence_length=256"],
    ["data.heldout_fraction=0", "checkpoint.probe_sequences=0"],
    ["schedule={warmup_steps: 10}"],
    ["train.stop_at=10", "train.gradient_accumulation_steps=4"],
    ["train.precision=bfloat16", "run.device=Ascend"],
    ["train.nonfinite=rollback", "checkpoint.every=5"],
    ["run.profile={start: 10, steps: 1}"],
    ["train.phases=[{steps: 10}]"],
    ["train.phases=[{shared: true, domains: []}]"],
    ["model.sparse.layers=1", "train.phases=[{shared: false, domains: [code], weights: {code: 1}}]"],
    ["model.vocab_size=4096", "data.max_domains_per_batch=2"],
    ["train.phases=[{weights: {code: 1}, old: [docs], replay: 0.1}]"],
    ["train.phases=[{steps: 5, weights: {code: 1}}, {weights: {docs: 1}, replay: 0.1}]"],
    ["train.phases=[{shared: regularised, regularise: {output: 1}}]"],
    ["train.phases=[{steps: 5, weights: {code: 1}}, {shared: regularised, weights: {docs: 1}, regularise: {ewc: 1}}]"],
    [
        SPARSE, "train.phases=[{shared: regularised, weights: {code: 1}, old: [docs], "
        "regularise: {output: 1, through: old}}]",
    ],
    ["data.stream={path: '-'}", "checkpoint.every_seconds=1"],
    ["domains.0.experts=5000"],
    ["model.sparse={layers: 1, router: switch, jitter: 0.01}"],
    ["model.sparse={layers: 1, router: noisy_top_k, top_k: 5}"],
    ["model.sparse={layers: 1, router: olmoe, top_k: 6, renormalise: true}"],
    ["model.sparse={layers: 1, router: gshard, top_k: 2}"],
    ["model.sparse={pattern: every_other, router: hash}", "experts.store=host"],
    ["parallel={data: 2, workers: 2}"],
    ["parallel={data: 2, expert: 2, workers: 4}", SPARSE],
    ["parallel={expert: 2, placement: domain, placement_groups: 2}", SPARSE, "domains.1.experts=4"],
    [
        "run.device=Ascend", "parallel={tensor: 4, pipeline: 4, sequence_parallel: true}",
        "train.gradient_accumulation_steps=4",
    ],
    ["run.device=Ascend", "parallel.expert=2", "model.sparse={layers: 1, dispatch: capacity}"],
]


@pytest.mark.parametrize(("overrides", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_rule_is_one_sentence_that_names_the_key(small, overrides, message):
    with pytest.raises(UserError) as error:
        small(*overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", FINE, ids=" ".join)
def test_the_border_of_a_rule_is_allowed(small, overrides):
    small(*overrides)


def test_sparse_layers_are_the_top_ones(small):
    assert small("model.sparse.layers=2").model.sparse_prefixes == ("blocks.1", "blocks.2")
    with_query = small("model.sparse={layers: 2, include_query_layer: true}").model
    assert with_query.sparse_prefixes == ("blocks.2", "query_layer")
    without = small("model.sparse.layers=2", "model.query_layer=none").model
    assert without.sparse_prefixes == ("blocks.2", "blocks.3")
    assert small().model.sparse_prefixes == ()


def test_a_pattern_says_which_blocks_are_sparse(small):
    assert small("model.sparse.pattern=every_other").model.sparse_prefixes == ("blocks.1",)
    assert small("model.sparse.pattern=every").model.sparse_prefixes == ("blocks.0", "blocks.1", "blocks.2")
    with_query = small("model.sparse={pattern: every, include_query_layer: true}").model
    assert with_query.sparse_prefixes == ("blocks.0", "blocks.1", "blocks.2", "query_layer")
    without = small("model.sparse.pattern=every_other", "model.query_layer=none").model
    assert without.sparse_prefixes == ("blocks.1", "blocks.3")


def test_stars_need_the_filters_of_code(small):
    with pytest.raises(UserError, match="only code is judged by its stars: set it to null, or domains.0.filters to"):
        small("domains.code.stars_field=stars")
    assert small("domains.code.stars_field=stars", "domains.code.filters=code").domains[0].filters == "code"
