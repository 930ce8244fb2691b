"""The domain file: embeddings of domains, and the space in which they were made. One safetensors file, no pickle.

Tensors, all float32: `embeddings` [n,m] (centred), `centre` [m]; with statistics of the seed model's routers-to-be also
`prototypes` [L,n,H] (centred), `input_mean` [L,H], `input_length` [L]; with an embedder other than the seed model also
`to_router` [L,H,m]. The header's metadata has names, documents, and who embedded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from moe_dist.errors import UserError

FORMAT = "moe_dist.domains.1"


@dataclass(frozen=True)
class RouterInputs:
    """What the seed model feeds to the MLP of each layer, which is what a router will see.

    mean `[L,H]`: over the domains' means, μ. length `[L]`: mean length c. to_router `[L,H,m]`: linear map from centred
    embeddings to prototypes, None where the prototypes were measured.
    """

    mean_LH: torch.Tensor
    length_L: torch.Tensor
    to_router_LHM: torch.Tensor | None = None


@dataclass(frozen=True)
class Domains:
    """names, in the order of the rows; documents: how many each mean is over; embedder: an id of what made the vectors.

    embeddings `[n,m]` and prototypes `[L,n,H]` are centred by `centre` `[m]` and by `inputs.mean`. prototypes and
    inputs are None where no seed model was run.
    """

    names: tuple[str, ...]
    documents: dict[str, int]
    embedder: str
    embeddings_NM: torch.Tensor
    centre_M: torch.Tensor
    prototypes_LNH: torch.Tensor | None = None
    inputs: RouterInputs | None = None

    @property
    def dim(self) -> int:
        return self.embeddings_NM.shape[1]

    @property
    def directions_NM(self) -> torch.Tensor:
        """The embeddings at length one, as the paper router takes them.

        How far a domain lies from the centre is a matter of the embedder's scale, and P_r is nearly quadratic: a domain
        twice as far would get a row four times as long, and with it the others' tokens.
        """
        return F.normalize(self.embeddings_NM, dim=1)

    @property
    def space(self) -> dict:
        """What a model made of these domains remembers: embeddings of another space do not fit beside them."""
        digest = hashlib.sha256(self.embedder.encode())
        for tensor in (self.centre_M, *self._input_tensors().values()):
            digest.update(tensor.contiguous().numpy().tobytes())
        return {"embedder": self.embedder, "dim": self.dim, "fingerprint": digest.hexdigest()}

    def check_same_space(self, space: dict | None, *, where: str) -> None:
        """Raise UserError unless `space` (of another file, or in a model's configuration) is this one's."""
        mine = self.space
        for name, said in (("embedder", "another embedder"), ("dim", "another dimension"), ("fingerprint", "a centre")):
            if space is None or space.get(name) != mine[name]:
                theirs = None if space is None else space.get(name)
                raise UserError(
                    f"{where} has embeddings of {said}: {name} is {theirs}, here {mine[name]}. Embed the new domain "
                    "with the same embedder and nexus.same_space_as set to the old domain file"
                )

    def check_prototypes_fit(self, *, layers: int, hidden: int, where: str) -> None:
        """Raise UserError unless the prototypes are of a model of so many layers and dimensions."""
        assert self.prototypes_LNH is not None
        if (self.prototypes_LNH.shape[0], self.prototypes_LNH.shape[2]) != (layers, hidden):
            raise UserError(
                f"{where} has prototypes {list(self.prototypes_LNH.shape)}, but the model has {layers} layers of "
                f"{hidden} dimensions: embed the domains with nexus.seed set to the seed of this model"
            )

    def _input_tensors(self) -> dict[str, torch.Tensor]:
        if self.inputs is None:
            return {}
        tensors = {"input_mean": self.inputs.mean_LH, "input_length": self.inputs.length_L}
        if self.inputs.to_router_LHM is not None:
            tensors["to_router"] = self.inputs.to_router_LHM
        return tensors

    def write(self, path: str | Path) -> None:
        """Write the file by way of a temporary one: it is there whole or not at all."""
        path = Path(path)
        tensors = {"embeddings": self.embeddings_NM, "centre": self.centre_M, **self._input_tensors()}
        if self.prototypes_LNH is not None:
            tensors["prototypes"] = self.prototypes_LNH
        # All of it under one key: the library writes several in any order, and the same domains shall be the same file.
        about = {"format": FORMAT, "names": self.names, "documents": self.documents, "embedder": self.embedder}
        data = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"domains": json.dumps(about, sort_keys=True)},
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except IsADirectoryError:
            raise UserError(f"{path}: is a folder; give the name of a file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def read_domains(path: str | Path) -> Domains:
    """Read a domain file. Raises UserError for anything else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; `moe-dist nexus embed CONFIG.yaml --out FILE` makes one")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get("domains", "{}"))
            if about.get("format") != FORMAT:
                raise UserError(f"{path}: not a domain file of `moe-dist nexus embed`")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        inputs = None
        if "input_mean" in tensors:
            inputs = RouterInputs(tensors["input_mean"], tensors["input_length"], tensors.get("to_router"))
        found = Domains(
            tuple(about["names"]),
            dict(about["documents"]),
            about["embedder"],
            tensors["embeddings"],
            tensors["centre"],
            tensors.get("prototypes"),
            inputs,
        )
        assert found.embeddings_NM.shape[0] == len(found.names)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged domain file: {error}") from None


def join(first: Domains, second: Domains, *, where: str) -> Domains:
    """The domains of both, in this order. Raises UserError where their spaces differ or a name is in both."""
    first.check_same_space(second.space, where=where)
    both = sorted(set(first.names) & set(second.names))
    if both:
        raise UserError(f"{where}: {', '.join(both)} is already there; give the new domain another name")
    prototypes = None
    if first.prototypes_LNH is not None:
        prototypes = torch.cat([first.prototypes_LNH, second.prototypes_LNH], dim=1)
    return Domains(
        first.names + second.names,
        first.documents | second.documents,
        first.embedder,
        torch.cat([first.embeddings_NM, second.embeddings_NM]),
        first.centre_M,
        prototypes,
        first.inputs,
    )
