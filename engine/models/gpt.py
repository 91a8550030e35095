"""GPT-2 and its contemporaries: LayerNorm, and an MLP of two products."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.opt import modeling_opt
from transformers.models.phi import modeling_phi
from transformers.pytorch_utils import Conv1D

from causalcone.engine.errors import ModelError
from causalcone.engine.models.decoder import Decoder, Reader
from causalcone.engine.models.registry import register
from causalcone.kernels.linear import Linear
from causalcone.kernels.rotary import Rotary


@register("gpt2")
class GPT2(Decoder, code=modeling_gpt2, family="GPT2"):
    """Learned positions, one fused projection to queries, keys and values (Conv1D)."""

    classes: ClassVar[dict[str, str | type]] = {"": "LMHeadModel", "transformer.h.*": "Block"}
    embedding, position_embedding = "transformer.wte", "transformer.wpe"
    layers, last_norm = "transformer.h", "transformer.ln_f"
    attn_in, mlp_in = "ln_1", "ln_2"
    attention = "attn"
    projections: ClassVar[tuple[str, ...]] = ("c_attn", "c_proj")
    mlp, activation = ("mlp.c_fc", "mlp.c_proj"), "mlp.act"
    linear_class: ClassVar[type] = Conv1D

    def __init__(self, model: Any) -> None:
        if getattr(model.config, "add_cross_attention", False):
            raise ModelError("GPT-2 with cross-attention layers (add_cross_attention) is not supported")
        super().__init__(model)


@register("gpt_neo")
class GPTNeo(GPT2, code=modeling_gpt_neo, family="GPTNeo"):
    """Learned positions, unscaled attention. Local layers see a window of tokens, the others all before."""

    classes: ClassVar[dict[str, str | type]] = {
        "transformer.h.*": "Block",
        "transformer.h.*.attn": "Attention",
        "transformer.h.*.attn.attention": "SelfAttention",
    }
    attention, projections = "attn.attention", ("q_proj", "k_proj", "v_proj", "out_proj")
    linear_class = nn.Linear

    def scale(self, attention: Any) -> float:
        return 1.0

    def window(self, layer: int) -> int | None:
        local = self.layer(layer).attn.attention.attention_type == "local"
        return self.model.config.window_size if local else None


@register("gptj")
class GPTJ(Decoder, code=modeling_gptj, family="GPTJ"):
    """Attention and MLP read one norm of the layer's input; the first dimensions of every head are turned in pairs of
    neighbours, by tables that the model holds."""

    classes: ClassVar[dict[str, str | type]] = {"transformer.h.*": "Block"}
    parallel = True
    embedding, layers, last_norm = "transformer.wte", "transformer.h", "transformer.ln_f"
    attn_in = mlp_in = "ln_1"
    attention, projections = "attn", ("q_proj", "k_proj", "v_proj", "out_proj")
    mlp, activation = ("mlp.fc_in", "mlp.fc_out"), "mlp.act"

    def __init__(self, model: Any) -> None:
        if not model.config.rotary_dim:
            raise ModelError(
                f"GPT-J without a number of rotary dimensions (rotary_dim {model.config.rotary_dim}) is refused"
            )
        super().__init__(model)

    def scale(self, attention: Any) -> float:
        return self.sizes.head_dim**-0.5

    def rotary(self, layer: int, read: Reader) -> Rotary:
        sin, cos = read.tensor(self.layer(layer).attn.embed_positions).chunk(2, dim=1)
        return Rotary(cos, sin, interleaved=True)


@register("gpt_neox")
class GPTNeoX(Decoder, code=modeling_gpt_neox, family="GPTNeoX"):
    """GPT-NeoX and Pythia: attention and MLP, each with its own norm, in parallel or in turn. One projection holds
    query, key and value of one head after another; the first dimensions of every head are turned."""

    classes: ClassVar[dict[str, str | type]] = {"gpt_neox.layers.*": "Layer"}
    embedding, layers, last_norm = "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm"
    rotary_module, rotary_table = "gpt_neox.rotary_emb", True
    attention, projections = "attention", ("query_key_value", "dense")
    mlp, activation = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), "mlp.act"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.parallel = model.config.use_parallel_residual

    def head_dim(self, attention: Any) -> int:
        return attention.head_size

    def read_projections(self, attention: Any, read: Reader) -> tuple[Linear, Linear]:
        fused = attention.query_key_value

        def product(places: slice) -> Linear:
            """With the query (place 0), the key (1) or the value (2) of every head, or several of them."""

            def pick(parameter: Tensor) -> Tensor:
                by_head = parameter.unflatten(0, (self.sizes.heads, 3, self.sizes.head_dim))
                return by_head[:, places].transpose(0, 1).flatten(0, 2)

            return read.product(pick(fused.weight), None if fused.bias is None else pick(fused.bias))

        return product(slice(1)), product(slice(1, 3))


@register("opt")
class OPT(Decoder, code=modeling_opt, family="OPT"):
    """Learned positions that begin at an offset."""

    classes: ClassVar[dict[str, str | type]] = {
        "model.decoder": "Decoder",
        "model.decoder.embed_positions": "LearnedPositionalEmbedding",
    }
    embedding, position_embedding = "model.decoder.embed_tokens", "model.decoder.embed_positions"
    layers, last_norm = "model.decoder.layers", "model.decoder.final_layer_norm?"
    attn_in, mlp_in = "self_attn_layer_norm", "final_layer_norm"
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    mlp, activation = ("fc1", "fc2"), "activation_fn"

    def __init__(self, model: Any) -> None:
        config = model.config
        if not config.do_layer_norm_before:
            raise ModelError("OPT with norms after attention and MLP (do_layer_norm_before=False) is not supported")
        if config.word_embed_proj_dim != config.hidden_size:
            raise ModelError(
                f"OPT with embeddings of another width than its layers (word_embed_proj_dim "
                f"{config.word_embed_proj_dim}, hidden_size {config.hidden_size}) is not supported"
            )
        super().__init__(model)


@register("phi")
class Phi(Decoder, code=modeling_phi, family="Phi"):
    """Phi-1 and Phi-2: attention and MLP read one norm of the layer's input; the first dimensions of every head are
    turned, and queries and keys may be normed head by head."""

    parallel = True
    rotary_module, rotary_table = "model.rotary_emb", True
    last_norm = "model.final_layernorm"
    attn_in = mlp_in = "input_layernorm"
    query_norm, key_norm = "self_attn.q_layernorm?", "self_attn.k_layernorm?"
    projections = ("q_proj", "k_proj", "v_proj", "dense")
    mlp, activation = ("mlp.fc1", "mlp.fc2"), "mlp.activation_fn"
