"""A finished run with everything a report can show, an interruption and an unverified export among it.

`python -m tests.report.rich FOLDER` writes it there together with its report, to look at.
"""

import math
import random
import sys
from pathlib import Path

from tests.report.runs import START, FakeRun, answer, evaluate, gate, phase, sha


def dataset(name, content, world, split, count):
    source = {"kind": "world", "world": world, "split": split, "count": count, "seed": 7}
    return {"name": name, "content": content, "sources": [source], "max_tokens": 512}


def rich_phases():
    held = ["tools-held", "repair-held", "pairs-held"]
    return [
        phase(
            "prepare",
            "data",
            datasets=[
                dataset("tools-train", "conversations", "tools", "train", 6000),
                dataset("agent-train", "conversations", "agent", "train", 6000),
                dataset("pairs-train", "pairs", "preferences", "train", 1500),
                dataset("repair-train", "tasks", "repair", "train", 2000),
                dataset("tools-held", "tasks", "tools", "heldout", 200),
                dataset("repair-held", "tasks", "repair", "heldout", 200),
                dataset("pairs-held", "pairs", "preferences", "heldout", 200),
            ],
        ),
        evaluate("eval-base", "base", held),
        evaluate("eval-base-few-shot", "base", held[:2], shots=3),
        phase(
            "sft",
            "tools",
            [gate("tools-loss", "loss", "<=", 0.5, reduction="mean_last")],
            model="base",
            dataset="tools-train",
        ),
        phase("merge", "merged", [gate("size", "size_ratio", "<=", 1.01)], model="tools"),
        evaluate("eval-tools", "merged", held),
        phase(
            "sft",
            "agent",
            [gate("agent-loss", "loss", "<=", 1.8, reduction="mean_last")],
            model="merged",
            dataset="agent-train",
        ),
        evaluate("eval-agent", "agent", held),
        phase("preference", "ipo", model="agent", dataset="pairs-train"),
        evaluate("eval-ipo", "ipo", held),
        phase(
            "grpo",
            "grpo",
            [gate("solved", "reward_accuracy", ">", 0.55, hard=False, reduction="mean_last")],
            model="ipo",
            dataset="repair-train",
        ),
        evaluate("eval-grpo", "grpo", held),
        phase(
            "export",
            "export",
            candidates=[{"model": name, "evaluation": f"eval-{name}"} for name in ("agent", "ipo", "grpo")],
            metrics=["tools-held.exact", "repair-held.hidden", "pairs-held.accuracy"],
            verify_dataset="tools-held",
        ),
    ]


SYSTEM = (
    "<|start|>system<|message|>You are a small model.\nKnowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\n"
    "Reasoning: low\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)
LEVELS = {
    "base": (0.015, 0.01, 0.52, 0.05),
    "merged": (0.90, 0.04, 0.70, 0.30),
    "agent": (0.88, 0.34, 0.74, 0.36),
    "ipo": (0.89, 0.36, 0.965, 1.9),
    "grpo": (0.90, 0.56, 0.955, 1.85),
}


def rich_answers(model, shots=0):
    """Answers whose cases keep their own difficulty from state to state, so that pairing matters."""
    tools, repair, pairs, margin = LEVELS[model]
    rows = []
    for at in range(200):
        case = random.Random(at)
        name, other = (case.choice(["brimol", "velka", "tarun", "sodep", "kelmo"]) for _ in range(2))
        luck = (case.random() + 0.15 * random.Random(f"{model}{at}{shots}").random()) / 1.15
        right = luck < tools * (6 if shots else 1)
        call = f'{{"item":"{name}","person":"{other if right else name}"}}'
        rows.append(
            answer(
                f"tools-{at:03d}",
                float(right),
                "tools-held",
                f"<|channel|>analysis<|message|>Use send_{name}.<|end|><|start|>assistant<|channel|>commentary "
                f"to=functions.send_{name} <|constrain|>json<|message|>{call}<|call|>"
                if luck < 0.95
                else "the the the <b>the</b> & the",
                SYSTEM + "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n"
                f"// Sends an item.\ntype send_{name} = (_: {{\nitem: string,\nperson: string,\n}}) => any;\n\n"
                f"}} // namespace functions<|end|><|start|>user<|message|>Please send {name} to {other}.<|end|>"
                "<|start|>assistant",
                exact=float(right),
                tool=float(luck < tools + 0.06),
                arguments=float(right),
                format=float(luck < 0.95),
                answer=float(luck < tools * 0.93),
            )
        )
        luck = (case.random() + 0.2 * random.Random(f"r{model}{at}").random()) / 1.2
        fixed = luck < repair
        rows.append(
            answer(
                f"repair-{at:03d}",
                None if at == 77 and model == "ipo" else float(fixed),
                "repair-held",
                '<|channel|>commentary to=functions.apply_patch <|constrain|>json<|message|>{"old": "return a < b", '
                f'"new": "return a {"<=" if fixed else ">"} b"}}<|call|>',
                f'{SYSTEM}<|start|>user<|message|>def {name}(a, b):\n    """True when a is at most b."""\n'
                "    return a < b\n\n"
                f"assert {name}(3, 3) == True<|end|><|start|>assistant",
                hidden=float(fixed),
                visible=float(luck < repair + 0.05),
                format=float(luck < 0.97),
            )
        )
        if not shots:
            gap = case.gauss(0, 0.4) * 0.8 + margin + random.Random(f"p{model}{at}").gauss(0, 0.2) + (pairs - 0.8)
            text = "chosen: <|channel|>final<|message|>Done: velka-52.<|return|>\n"
            text += "rejected: <|channel|>final<|message|>I will do the rest later.<|return|>"
            rows.append(
                answer(f"pair-{at:03d}", float(gap > 0), "pairs-held", text, accuracy=float(gap > 0), margin=gap)
            )
    return rows


def rich_steps(kind, count):
    noise = random.Random(kind)
    rows = []
    for step in range(1, count + 1):
        done = step / count
        row = {
            "step": step,
            "loss": 0.25 + 3.2 * math.exp(-6 * done) + noise.gauss(0, 0.05),
            "gradient_norm": 0.4 + 2.5 * math.exp(-8 * done) + abs(noise.gauss(0, 0.2)),
            "learning_rate": 1e-3 * (1 - done),
            "tokens": 4096,
            "target_tokens": 900,
            "seconds": 0.3,
        }
        if kind == "sft":
            row |= {"tokens_per_second": 13650.0, "peak_flops_share": 0.31, "peak_memory_bytes": 1_900_000_000}
            row |= {"expert_load_max": 1.6 + abs(noise.gauss(0, 0.2)), "dead_experts": 0.0, "router_entropy": 1.9}
            if step % 20 == 0:
                row["held_out_loss"] = 0.35 + 3.2 * math.exp(-6 * done) + 0.3 * max(0.0, done - 0.6)
        if kind == "preference":
            row |= {"margin": 2 * done + noise.gauss(0, 0.15), "accuracy": min(1.0, 0.6 + 0.5 * done)}
        if kind == "grpo":
            reward = min(1.0, max(0.0, 0.34 + 0.3 * done + noise.gauss(0, 0.08)))
            row |= {"reward": reward, "reward_accuracy": reward, "zero_spread_groups": noise.randint(0, 5)}
            row |= {"unscorable": 0, "mean_new_tokens": 42 + noise.gauss(0, 2)}
        rows.append(row)
    return rows


def rich_run(path):
    """A finished quickstart with everything a report can show, an interruption and an unverified export among it."""
    made = FakeRun(path, rich_phases())
    adapters = {}
    for spec in made.phases.values():
        name, kind = spec["name"], spec["kind"]
        if kind == "prepare":
            counts = {f"{d['name']}.rows": d["sources"][0]["count"] for d in spec["datasets"]}
            counts |= {"agent-train.dropped_too_long": 31, "tools-train.dropped_too_long": 0}
            outputs = [
                {"path": f"data/{d['name']}", "bytes": 10**6, "sha256": sha(d["name"])} for d in spec["datasets"]
            ]
            made.complete(name, 21.0, counts=counts, outputs=outputs)
        elif kind == "evaluate":
            rows = rich_answers(spec["model"], spec["shots"])
            made.answers(name, rows)
            made.complete(name, 13.0, counts={"tools-held.asked": 200, "repair-held.asked": 200})
        elif kind == "merge":
            made.complete(
                name,
                2.1,
                {"bytes": 5_200_000, "size_ratio": 1.0},
                gates={"size": (1.0, True)},
                state={
                    "base": "phases/merged/final",
                    "base_digest": sha("merged"),
                    "adapter": None,
                    "adapter_digest": None,
                    "phase": name,
                },
            )
        elif kind == "export":
            made.complete(
                name,
                8.0,
                details={
                    "chosen": "grpo",
                    "candidates": [
                        {
                            "model": m,
                            "evaluation": f"eval-{m}",
                            "mean": v,
                            "metrics": {"tools-held.exact": 0.9, "repair-held.hidden": v},
                            "chosen": m == "grpo",
                        }
                        for m, v in (("agent", 0.653), ("ipo", 0.738), ("grpo", 0.805))
                    ],
                    "verification": [
                        {
                            "pair": "engine / merged",
                            "prompts": 20,
                            "max_abs": 3.1e-5,
                            "mean_abs": 2e-6,
                            "kl": 1e-11,
                            "greedy_agreement": 1.0,
                            "status": "agrees",
                            "reason": None,
                        },
                        {
                            "pair": "gguf / merged",
                            "prompts": 20,
                            "max_abs": None,
                            "mean_abs": None,
                            "kl": None,
                            "greedy_agreement": None,
                            "status": "unverified",
                            "reason": "node-llama-cpp was not found",
                        },
                    ],
                },
                outputs=[
                    {"path": f"exports/{f}/{f}.bin", "bytes": 5_000_000, "sha256": sha(f)}
                    for f in ("adapter", "hf", "gguf")
                ],
                notes=["GGUF: node-llama-cpp was not found, so nothing was compared"],
            )
        else:
            made.steps(name, rich_steps(kind, {"tools": 320, "agent": 260, "ipo": 60, "grpo": 40}[name]))
            if name == "ipo":
                made.start(name)
                made.clock += 9
                made.event("stopped", attempt=1, message="stopped in ipo after step 22 of 60; saved")
                made.event("attempt_started", attempt=2)
            adapters[name] = sha(name + "adapter")
            base = "merged" if name != "tools" else "base"
            gates = {
                g["name"]: {"tools-loss": (0.253, True), "agent-loss": (0.26, True), "solved": (0.5312, False)}[
                    g["name"]
                ]
                for g in spec["gates"]
            }
            made.complete(
                name,
                {"tools": 92.0, "agent": 88.0, "ipo": 31.0, "grpo": 75.0}[name],
                {"final_loss": 0.25},
                began="phase_resumed" if name == "ipo" else "phase_started",
                gates=gates,
                counts={"rows": 6000, "samples_read": 5120}
                if kind == "sft"
                else {"unscorable": 2 if kind == "grpo" else 0},
                state={
                    "base": "x",
                    "base_digest": sha(base),
                    "adapter": f"phases/{name}/final",
                    "adapter_digest": adapters[name],
                    "phase": name,
                },
            )
    made.event("run_completed", attempt=2)
    packages = {"posttrain": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    execution = {"device": "cpu", "threads": 2, "micro_batch_tokens": 8192}
    made.manifest(
        run_id="6f1e",
        name=made.run.path.name,
        created=START,
        source="quickstart",
        recipe_digest=sha("recipe"),
        seed=42,
        model_digest=sha("base"),
        datasets={},
        git={"commit": "0521d82aa1", "dirty": True},
        packages=packages,
        hardware={"cpu": "Some CPU", "cores": 2, "memory_bytes": 8_000_000_000, "python": "3.11.2"},
        attempts=[
            {"number": 1, "started": START, "finished": START + 290, "outcome": "stopped", "execution": execution},
            {"number": 2, "started": START + 300, "finished": None, "outcome": None, "execution": execution},
        ],
    )
    return made


if __name__ == "__main__":
    from posttrain.report.page import write_report

    write_report(rich_run(Path(sys.argv[1])).run)
