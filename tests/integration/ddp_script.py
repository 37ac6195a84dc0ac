"""A plain DistributedDataParallel script around tables over ranks, for test_ranks.py.

    torchrun --nproc-per-node 2 ddp_script.py OUT [attached] [clipped] [from=OUT] [die] [gpu]
        [refusing]

Without a launcher it is the same model in one process, on all ranks' samples.
"""

import os
import sys

import torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import penstock
from penstock import Adagrad, EmbeddingCollection, FeatureConfig, Jagged, KeyedJagged, TableConfig
from penstock.config import AdmitFrequent

out, options = sys.argv[1], sys.argv[2:]
rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
group = None
device = torch.device("cuda", rank) if "gpu" in options else torch.device("cpu")
if size > 1:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = distributed.group.WORLD
torch.manual_seed(0)
admission = AdmitFrequent(min_count=3) if "refusing" in options else None
tables = [
    TableConfig(name=n, dim=8, optimizer=Adagrad(learning_rate=0.1), admission=admission)
    for n in ("user", "item")
]
features = [
    FeatureConfig(name="user", table="user", pooling="sum"),
    FeatureConfig(name="seen", table="item", pooling="mean"),
]
embeddings = EmbeddingCollection(tables, features, group=group, num_threads=1, device=device)
for option in options:
    if option.startswith("from="):
        embeddings.load_tables(f"{option[5:]}/tables")
head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).to(
    device
)
head = DistributedDataParallel(head) if size > 1 else head
optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
if "attached" in options:
    embeddings.attach(optimizer)
generator = torch.Generator().manual_seed(1)
losses = []
for step in range(30):
    if "die" in options and rank == 1 and step == 5:
        os._exit(9)
    users = torch.randint(-(2**63), 2**63 - 1, (24,), generator=generator) % 50
    seen = torch.randint(0, 40, (24, 3), generator=generator)
    label = ((users + seen[:, 0]) % 3 == 0).float()
    label, mine = label.to(device), slice(rank, None, size)
    columns = {"user": Jagged.from_dense(users[mine]), "seen": Jagged.from_dense(seen[mine])}
    optimizer.zero_grad()
    score = head(embeddings(KeyedJagged.pack(columns)))[:, 0]
    loss = F.binary_cross_entropy_with_logits(score, label[mine])
    loss.backward()
    if "clipped" in options:
        penstock.clip_grad_norm_([head, embeddings], 0.2)
    optimizer.step()
    if not embeddings.is_attached:
        embeddings.apply_gradients()
    losses.append(loss.detach())
total = torch.stack(losses)
if size > 1:
    distributed.all_reduce(total)
embeddings.save_tables(f"{out}/tables")
if rank == 0:
    torch.save({"losses": total / size, "head": head.state_dict()}, f"{out}/result.pt")
