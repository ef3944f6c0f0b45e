"""The job on Ray Data over a folder with the bundled videos and one that is none, with one engine on CPUs.

prints what was described; its exit code is 1 where a video has no answer, or what is none has one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_lvspec.demo import bundled_clips
from vllm_lvspec.reference import PAIRS, TARGET

JOB = Path(__file__).parents[2] / "deploy" / "ray" / "batch.py"


def main() -> None:
    clips = {clip.path.name: clip for clip in bundled_clips()}
    with tempfile.TemporaryDirectory(prefix="lvspec-") as folder:
        videos, out = Path(folder, "videos"), Path(folder, "out")
        videos.mkdir()
        for clip in clips.values():
            shutil.copy(clip.path, videos)
        (videos / "none.mp4").write_bytes(b"not a video")
        engine = {
            "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True,
            "kv_cache_memory_bytes": 2**28, "media_io_kwargs": {"video": PAIRS["qwen2_5_vl"].sampling},
        }  # fmt: skip
        subprocess.run(
            [
                sys.executable, str(JOB), str(videos), "--model", str(TARGET), "--out", str(out),
                "--cpus-per-engine", "1", "--batch-size", "4", "--max-tokens", "256", "--engine", json.dumps(engine),
            ],
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )  # fmt: skip
        rows = [json.loads(line) for path in out.glob("*.json") for line in path.read_text().splitlines()]
    told = facts = 0
    for row in rows:
        name = Path(row["video"]).name
        print(f"{name}: {row['text'] or row['error']}"[:160])
        if name in clips and row["text"]:
            score = clips[name].score(row["text"])
            told, facts = told + sum(score.right.values()), facts + sum(score.required.values())
    print(f"{len(rows)} files, {told} of {facts} facts are told")
    is_right = {Path(row["video"]).name: bool(row["text"]) for row in rows} == dict.fromkeys(clips, True) | {
        "none.mp4": False
    }
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
