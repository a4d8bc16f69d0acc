"""Builds the program of a decoder from its configuration, its architecture and its tensors.

A layer is attention and feed-forward.  Each reads the residual stream `hidden` and adds to it.
Source: Vaswani et al. 2017; the differences between families are in families/.
"""

from collections.abc import Iterator

from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Operation
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.program import Tensor
from llmsrv.model.architecture import Architecture
from llmsrv.model.config import ExpertsConfig
from llmsrv.model.config import ModelConfig
from llmsrv.model.tensors import Tensors


def build_program(config: ModelConfig, architecture: Architecture, tensors: Tensors) -> Program:
    """Raises ModelError if a tensor is missing or does not match the configuration."""
    return Program(
        operations=tuple(_Decoder(config, architecture, tensors).operations()),
        buffers=_buffers(config, architecture),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        long_from=config.long_from,
    )


def _buffers(config: ModelConfig, architecture: Architecture) -> dict[str, int]:
    hidden = config.hidden_size
    buffers = {
        "hidden": hidden,
        "qkv": (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
        "attended": config.num_heads * config.head_dim,
        "last": hidden,
        "last_normed": hidden,
        "logits": config.vocab_size,
    }
    if architecture.has_pre_norms:
        buffers |= {"normed": hidden}
    if architecture.has_post_norms:
        buffers |= {"projected": hidden}
    if config.experts is None:
        inner = config.intermediate_size
        buffers |= {"gate_up": 2 * inner, "activated": inner}
    return buffers


class _Decoder:
    def __init__(
        self, config: ModelConfig, architecture: Architecture, tensors: Tensors
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.tensors = tensors

    def operations(self) -> Iterator[Operation]:
        config, tensors = self.config, self.tensors
        shape = config.vocab_size, config.hidden_size
        embedding = tensors.take("token_embd.weight", *shape)
        yield Embed("hidden", embedding, config.embedding_scale)
        for layer in range(config.num_layers):
            yield from self.attention(layer, f"blk.{layer}.")
            yield from self.feed_forward(f"blk.{layer}.")
        yield SelectLogitRows("last", "hidden")
        norm = tensors.norm("output_norm", config.hidden_size)
        yield Norm("last_normed", "last", norm, config.norm_eps)
        yield Linear("logits", "last_normed", (self.lm_head(embedding),), scale=config.logit_scale)
        if config.logit_softcap is not None:
            yield Softcap("logits", config.logit_softcap)

    def lm_head(self, embedding: Tensor) -> Tensor:
        """The output weights, which may be the embedding."""
        name, shape = "output.weight", embedding.shape
        if self.config.is_tied is None:
            return self.tensors.maybe_take(name, *shape) or embedding
        if self.config.is_tied:
            self.tensors.ignore(name)
            return embedding
        return self.tensors.take(name, *shape)

    def attention(self, layer: int, name: str) -> Iterator[Operation]:
        config, positions = self.config, self.config.layers[layer]
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rows = {name + "attn_q": q, name + "attn_k": kv, name + "attn_v": kv}
        if self.architecture.has_fused_projections:
            rows = {name + "attn_qkv": q + 2 * kv}

        yield from self.pre_norm(name + "attn_norm")
        yield Linear("qkv", self.normed, *self.tensors.linear(rows, config.hidden_size))
        yield self.rope_and_store(layer, name)
        yield Attention(
            "attended",
            "qkv",
            layer,
            config.attention_scale,
            window=positions.window,
            softcap=config.attention_softcap,
        )
        yield from self.residual("attended", name + "attn_output", q, name + "post_attention_norm")

    def rope_and_store(self, layer: int, name: str) -> Operation:
        config, rope = self.config, self.config.layers[layer].rope
        q_norm = k_norm = None
        if self.architecture.qk_norms != "none":
            is_each = self.architecture.qk_norms == "per_head"
            q, kv = (1, 1) if is_each else (config.num_heads, config.num_kv_heads)
            q_norm = self.tensors.norm(name + "attn_q_norm", q * config.head_dim)
            k_norm = self.tensors.norm(name + "attn_k_norm", kv * config.head_dim)
        return RopeAndStore(
            "qkv",
            layer,
            frequencies=rope.frequencies if rope else None,
            long_frequencies=rope.long_frequencies if rope else None,
            magnitude=rope.magnitude if rope else 1.0,
            interleaved=config.rope_is_interleaved,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=config.norm_eps,
        )

    def feed_forward(self, name: str) -> Iterator[Operation]:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        yield from self.pre_norm(name + "ffn_norm")
        if self.config.experts is not None:
            yield self.experts(name, self.config.experts)
            return
        rows = {name + "ffn_gate": inner, name + "ffn_up": inner}
        if self.architecture.has_fused_projections:
            rows = {name + "ffn_up": 2 * inner}
        yield Linear("gate_up", self.normed, *self.tensors.linear(rows, hidden))
        yield GatedActivation("activated", "gate_up", self.architecture.activation)
        yield from self.residual("activated", name + "ffn_down", inner, name + "post_ffw_norm")

    def experts(self, name: str, experts: ExpertsConfig) -> Operation:
        num, inner, hidden = experts.num_experts, experts.intermediate_size, self.config.hidden_size
        gates = self.tensors.experts(name + "ffn_gate_exps", num, inner, hidden)
        ups = self.tensors.experts(name + "ffn_up_exps", num, inner, hidden)
        return Experts(
            "hidden",
            self.normed,
            router=self.tensors.take(name + "ffn_gate_inp.weight", num, hidden),
            gate_up=tuple(zip(gates, ups, strict=True)),
            down=tuple(self.tensors.experts(name + "ffn_down_exps", num, hidden, inner)),
            num_chosen=experts.num_chosen,
            normalise=experts.normalise,
            function=self.architecture.activation,
            scale=self.config.residual_scale,
        )

    # ---- Reading and writing the residual stream

    @property
    def normed(self) -> str:
        """The name of the buffer that attention and feed-forward read."""
        return "normed" if self.architecture.has_pre_norms else "hidden"

    def pre_norm(self, name: str) -> Iterator[Operation]:
        if self.architecture.has_pre_norms:
            weight = self.tensors.norm(name, self.config.hidden_size)
            yield Norm("normed", "hidden", weight, self.config.norm_eps)

    def residual(self, x: str, name: str, columns: int, norm: str) -> Iterator[Operation]:
        """Projects the output of attention or feed-forward and adds it to `hidden`."""
        hidden, scale = self.config.hidden_size, self.config.residual_scale
        product = self.tensors.linear({name: hidden}, columns)
        if not self.architecture.has_post_norms:
            yield Linear("hidden", x, *product, scale=scale, accumulate=True)
            return
        yield Linear("projected", x, *product, scale=scale)
        weight = self.tensors.norm(norm, hidden)
        yield Norm("hidden", "projected", weight, self.config.norm_eps, accumulate=True)
