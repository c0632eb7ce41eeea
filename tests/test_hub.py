"""Pushing to a Hub and pulling from it: every byte over HTTP, to a server on this machine and back."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from .helpers import ROOT, assert_equal_up_to_rounding
from .hub_server import TOKEN, HubServer, validate_metadata


pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

CODE = {"configuration_coe.py", "modeling_coe.py", "balancing.py", "checkpoint.py", "experts.py"}


class StepFailed(Exception):
    """An error that a step raised in a worker, with the names of its class and of that class's bases."""

    def __init__(self, message: str, kinds: list[str]):
        super().__init__(message)
        self.kinds = kinds


class Worker:
    """A fresh interpreter with a home of its own, which calls functions of `hub_worker.py`."""

    def __init__(self, server: HubServer, folder: Path, *options: str):
        folder.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("PYTHONPATH", None)
        if not options:
            environment["PYTHONPATH"] = str(ROOT)
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("hub_worker.py")), *options],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __call__(self, step: str, **arguments) -> dict:
        watchdog = threading.Timer(300, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps({"step": step, **arguments}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        assert answer, f"the worker died:\n{self.log.read_text()}"
        answer = json.loads(answer)
        if "error" in answer:
            raise StepFailed(answer["error"], answer["kinds"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def new_worker(server, tmp_path_factory):
    workers: list[Worker] = []

    def start(*options: str) -> Worker:
        workers.append(Worker(server, tmp_path_factory.mktemp("worker") / "run", *options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def pusher(new_worker):
    return new_worker()


@pytest.fixture(scope="module")
def puller(new_worker):
    return new_worker()


@pytest.fixture(scope="module")
def stranger(new_worker):
    """Pulls where this package is not installed."""
    return new_worker("--without-package")


@pytest.fixture(autouse=True)
def no_faults_left(server):
    yield
    server.faults.clear()


def assert_same_model(actual: dict, expected: dict) -> None:
    """The weights bit for bit, and what another process computes with them."""
    assert actual["weights"] == expected["weights"]
    assert_equal_up_to_rounding(torch.tensor(actual["logits"]), torch.tensor(expected["logits"]))


def assert_pulled(worker: Worker, pushed: dict, repo: str, **kwargs) -> dict:
    answer = worker("pull", repo=repo, **kwargs)
    assert_same_model(answer, pushed)
    return answer


@pytest.mark.parametrize("mode", ["lfs", "regular"])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_model_round_trip(server, pusher, puller, stranger, layout, mode):
    repo = f"tester/{layout}-{mode}"
    if mode == "regular":
        server.regular_only.add(repo)
    pushed = pusher("push", repo=repo, **({"max_shard_size": "40KB"} if layout == "sharded" else {}))
    stored = server.repos[repo]
    assert pushed["oid"] == stored.head
    assert len(stored.commits) == 2  # the empty repository, and all of the model at once

    weights = {name for name in stored.files if name.endswith(".safetensors")}
    assert {"config.json", "README.md"} | CODE <= stored.files.keys()
    assert (len(weights) > 3 and "model.safetensors.index.json" in stored.files) == (layout == "sharded")
    assert all(stored.files[name].is_lfs == (mode == "lfs") for name in weights)
    assert any(f"PUT /{repo}/" in request for request in server.requests) == (mode == "lfs")

    here = assert_pulled(puller, pushed, repo)
    there = assert_pulled(stranger, pushed, repo)
    assert here["revision"] == there["revision"] == pushed["oid"]
    assert here["module"] == "modeling_coe.modeling_coe"
    assert there["module"].startswith("transformers_modules")


def test_second_identical_push_makes_no_commit(server, pusher):
    first = pusher("push", repo="tester/twice"), pusher("push_tokenizer", repo="tester/twice")
    commits = len(server.repos["tester/twice"].commits)
    second = pusher("push", repo="tester/twice"), pusher("push_tokenizer", repo="tester/twice")
    assert second[0]["oid"] == second[1]["oid"] == first[1]["oid"]
    assert len(server.repos["tester/twice"].commits) == commits


def test_trainer_pushes_model_tokenizer_and_card(server, pusher, puller, stranger, tmp_path):
    pushed = pusher("train_and_push", folder=str(tmp_path / "run"), repo="tester/trained")
    files = server.repos["tester/trained"].files
    assert {"training_args.bin", "tokenizer.json", "model.safetensors"} | CODE <= files.keys()
    assert "generated_from_trainer" in files["README.md"].content.decode()
    for worker in (puller, stranger):
        assert_pulled(worker, pushed, "tester/trained")
        answer = worker("pull_tokenizer", repo="tester/trained")
        assert answer == {"input_ids": [3, 9, 5, 0, 7], "eos": "</s>"}


def test_adapter_round_trip(server, pusher, puller, stranger):
    pytest.importorskip("peft")
    base = pusher("push", repo="tester/base")
    pushed = pusher("push_adapter", repo="tester/adapter", base="tester/base")
    assert (torch.tensor(pushed["logits"]) - torch.tensor(base["logits"])).abs().max() > 0.1
    files = server.repos["tester/adapter"].files
    assert json.loads(files["adapter_config.json"].content)["base_model_name_or_path"] == "tester/base"
    assert len(files["adapter_model.safetensors"].content) > 0 and "model.safetensors" not in files
    for worker in (puller, stranger):
        assert_pulled(worker, pushed, "tester/base", adapter="tester/adapter")


def test_revisions_stay_readable(server, pusher, puller):
    first = pusher("push", repo="tester/revisions", seed=0)
    second = pusher("push", repo="tester/revisions", seed=1)
    branch = pusher("push", repo="tester/revisions", seed=2, revision="experiment")
    assert len({first["oid"], second["oid"], branch["oid"]}) == 3
    assert server.repos["tester/revisions"].branches == {"main": second["oid"], "experiment": branch["oid"]}
    for revision, pushed in ((first["oid"], first), ("main", second), ("experiment", branch)):
        answer = assert_pulled(puller, pushed, "tester/revisions", revision=revision)
        assert answer["revision"] == pushed["oid"]


def test_any_revision_is_converted(pusher, puller, tmp_path):
    repo = "tester/source"
    pushes = [pusher("push_source", folder=str(tmp_path / str(seed)), repo=repo, seed=seed) for seed in (0, 1)]
    for number, (revision, pushed) in enumerate([(pushes[0]["oid"], pushes[0]), (None, pushes[1])]):
        result = puller("convert", repo=repo, out=str(tmp_path / f"out{number}"), revision=revision)
        assert result["source"]["name"] == repo and result["source"]["revision"] == pushed["oid"]
        assert_equal_up_to_rounding(torch.tensor(result["logits"]), torch.tensor(pushed["logits"]))
    with pytest.raises(StepFailed, match="RevisionNotFoundError"):
        puller("convert", repo=repo, out=str(tmp_path / "none"), revision="absent")


def test_adapters_of_a_repository_are_merged_before_conversion(pusher, puller, tmp_path):
    pytest.importorskip("peft")
    pusher("push", repo="tester/base-to-convert")
    pushed = pusher("push_adapter", repo="tester/adapter-to-convert", base="tester/base-to-convert")
    arguments = {"repo": "tester/adapter-to-convert", "out": str(tmp_path / "out"), "to": "official"}
    result = puller("convert", **arguments, merge_adapter=True)
    torch.testing.assert_close(torch.tensor(result["logits"]), torch.tensor(pushed["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["commit", "lfs"])
def test_broken_push_leaves_the_old_revision(server, pusher, puller, kind):
    repo = f"tester/broken-{kind}"
    old = pusher("push", repo=repo, seed=0)
    # The client sends objects again after a broken connection, commits it does not.
    server.faults[kind] = ["break", "refuse"] if kind == "lfs" else ["break"]
    with pytest.raises(StepFailed) as failure:
        pusher("push", repo=repo, seed=1)
    assert {"RemoteProtocolError", "NetworkError", "RuntimeError"} & set(failure.value.kinds)
    assert server.faults[kind] == []
    assert server.repos[repo].head == old["oid"]
    assert assert_pulled(puller, old, repo)["revision"] == old["oid"]

    new = pusher("push", repo=repo, seed=1)
    assert new["oid"] == server.repos[repo].head != old["oid"]
    assert_pulled(puller, new, repo)


def test_upload_that_breaks_once_is_repeated(server, pusher):
    server.faults["lfs"] = ["break"]
    pushed = pusher("push", repo="tester/repeated")
    assert server.faults["lfs"] == [] and pushed["oid"] == server.repos["tester/repeated"].head


def test_broken_push_of_save_pretrained_leaves_a_whole_folder(server, pusher, puller, tmp_path):
    folder, repo = tmp_path / "model", "tester/saved"
    old = pusher("push", repo=repo, seed=0)
    new = pusher("push", repo="tester/expected", seed=1)
    server.faults["commit"] = ["break"]
    with pytest.raises(StepFailed):
        pusher("save_and_push", folder=str(folder), repo=repo, seed=1)
    assert server.repos[repo].head == old["oid"]
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
    assert_pulled(puller, new, str(folder))

    pusher("save_and_push", folder=str(folder), repo=repo, seed=1)
    assert_pulled(puller, new, repo)


def test_what_is_missing_is_named(server, pusher, puller):
    pusher("push", repo="tester/private", private=True)
    for kind, arguments in (
        ("RepositoryNotFoundError", {"repo": "tester/absent", "filename": "config.json"}),
        ("RepositoryNotFoundError", {"repo": "tester/private", "filename": "config.json", "token": False}),
        ("RevisionNotFoundError", {"repo": "tester/private", "filename": "config.json", "revision": "absent"}),
        ("EntryNotFoundError", {"repo": "tester/private", "filename": "absent.json"}),
    ):
        with pytest.raises(StepFailed) as failure:
            puller("download", **arguments)
        assert kind in failure.value.kinds
    assert puller("download", repo="tester/private", filename="config.json")["text"].startswith("{")
    with pytest.raises(StepFailed, match="tester/absent") as failure:
        puller("pull", repo="tester/absent")
    assert "OSError" in failure.value.kinds


def test_invalid_card_is_refused_before_anything_is_uploaded(server, pusher, tmp_path):
    pusher("push", repo="tester/card")
    head = server.repos["tester/card"].head
    (tmp_path / "README.md").write_text("---\nlanguage: no\ntags: one\n---\n# A model\n")
    (tmp_path / "other.safetensors").write_bytes(b"weights")
    with pytest.raises(StepFailed, match=r'"language" must .*, got False\n- "tags" must be an array') as failure:
        pusher("push_folder", folder=str(tmp_path), repo="tester/card")
    assert "ValueError" in failure.value.kinds
    assert server.repos["tester/card"].head == head
    assert hashlib.sha256(b"weights").hexdigest() not in server.repos["tester/card"].objects


def test_pushed_card_describes_the_model_and_its_snippets_run(server, pusher, puller, stranger):
    repo = "tester/described"
    pushed = pusher("push", repo=repo)
    pusher("push_tokenizer", repo=repo)
    card = server.repos[repo].files["README.md"].content.decode()
    assert validate_metadata(card) == ([], [])
    assert card.count("# described\n") == 1 and "Chain-of-Experts" in card and "[More Information Needed]" not in card
    for worker in (puller, stranger):
        answer = worker("run_snippets", repo=repo)
        assert answer["blocks"] == 2
        assert_same_model(answer, pushed)


def test_card_of_the_trainer_is_extended(server, pusher, tmp_path):
    repo = "tester/attached"
    pusher("train_and_push", folder=str(tmp_path / "run"), repo=repo, attach_card=True)
    card = server.repos[repo].files["README.md"].content.decode()
    assert validate_metadata(card) == ([], [])
    assert "generated_from_trainer" in card and "### Training hyperparameters" in card
    assert "chain-of-experts" in card and "2 steps" in card


class TestServer:
    """The server keeps the promises that the tests above build on."""

    @pytest.fixture
    def request_(self, server):
        def send(method, path, body=None, token=TOKEN, **headers):
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if token:
                headers["Authorization"] = f"Bearer {token}"
            request = urllib.request.Request(server.url + path, data, headers, method=method)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(request, timeout=10) as response:
                    return response.status, dict(response.headers), response.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, dict(error.headers), error.read()

        return send

    @staticmethod
    def commit(*operations, **header):
        lines = [{"key": "header", "value": {"summary": "test", **header}}]
        lines += [{"key": key, "value": value} for key, value in operations]
        return b"\n".join(json.dumps(line).encode() for line in lines)

    def test_creating_a_repository_needs_a_token_and_a_new_name(self, request_):
        assert request_("POST", "/api/repos/create", {"name": "made"}, token=None)[0] == 401
        assert request_("POST", "/api/repos/create", {"name": "made"})[0] == 200
        assert request_("POST", "/api/repos/create", {"name": "made"})[0] == 409
        assert json.loads(request_("GET", "/api/whoami-v2")[2])["name"] == "tester"

    def test_ranges(self, request_):
        request_("POST", "/api/repos/create", {"name": "ranges"})
        content = base64.b64encode(b"0123456789").decode()
        body = self.commit(("file", {"path": "data/digits", "content": content, "encoding": "base64"}))
        assert request_("POST", "/api/models/tester/ranges/commit/main", body)[0] == 200
        path = "/tester/ranges/resolve/main/data/digits"
        for wanted, status, expected in (
            ("bytes=2-4", 206, b"234"),
            ("bytes=7-", 206, b"789"),
            ("bytes=-2", 206, b"89"),
            ("bytes=8-99", 206, b"89"),
        ):
            answer = request_("GET", path, Range=wanted)
            assert (answer[0], answer[2]) == (status, expected)
        assert request_("GET", path, Range="bytes=10-")[0] == 416
        status, headers, body = request_("HEAD", path)
        assert (status, headers["Content-Length"], body) == (200, "10", b"")
        assert headers["ETag"] == f'"{hashlib.sha1(b"blob 10" + bytes(1) + b"0123456789").hexdigest()}"'
        tree = json.loads(request_("GET", "/api/models/tester/ranges/tree/main")[2])
        assert [(entry["type"], entry["path"]) for entry in tree] == [
            ("file", ".gitattributes"),
            ("directory", "data"),
        ]

    def test_objects_are_stored_only_if_their_hash_is_right(self, server, request_):
        request_("POST", "/api/repos/create", {"name": "objects"})
        oid = hashlib.sha256(b"weights").hexdigest()
        assert request_("PUT", f"/tester/objects/lfs/{oid}", b"weight")[0] == 400
        commit = self.commit(("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": oid, "size": 7}))
        assert request_("POST", "/api/models/tester/objects/commit/main", commit)[0] == 400
        assert request_("PUT", f"/tester/objects/lfs/{oid}", b"weights")[0] == 200
        assert request_("POST", "/api/models/tester/objects/commit/main", commit)[0] == 200
        assert request_("GET", "/tester/objects/resolve/main/w.bin")[1]["ETag"] == f'"{oid}"'

    def test_commits_are_whole_or_absent(self, server, request_):
        request_("POST", "/api/repos/create", {"name": "atomic"})
        head = server.repos["tester/atomic"].head
        path = "/api/models/tester/atomic/commit/main"
        good = ("file", {"path": "a", "content": "YQ==", "encoding": "base64"})
        for bad in (("deletedFile", {"path": "absent"}), ("unknown", {"path": "b"})):
            assert request_("POST", path, self.commit(good, bad))[0] >= 400
        assert request_("POST", path, self.commit(good, parentCommit="0" * 40))[0] == 412
        assert server.repos["tester/atomic"].head == head
        assert request_("POST", path, self.commit(good, parentCommit=head))[0] == 200
        assert request_("POST", path, self.commit(("deletedFile", {"path": "a"})))[0] == 200
        assert list(server.repos["tester/atomic"].files) == [".gitattributes"]
        assert len(server.repos["tester/atomic"].commits) == 3

    @pytest.mark.parametrize(
        ("metadata", "named"),
        [
            ("language: no", '"language"'),
            ("tags: one", '"tags"'),
            ("license: [1]", '"license"'),
            ("base_model: /a/folder", '"base_model"'),
            ("datasets: [two words]", '"datasets"'),
            ("pipeline_tag: cooking", '"pipeline_tag"'),
            ("- a list", "not a mapping"),
            ("a: [", "not YAML"),
            ("model-index: {}", '"model-index" must be an array'),
            ("model-index: [{name: m}]", '"model-index[0].results"'),
            ("model-index: [{name: m, results: [{task: {type: t}}]}]", "dataset.type"),
        ],
    )
    def test_metadata_that_is_wrong(self, metadata, named):
        (error, *_), warnings = validate_metadata(f"---\n{metadata}\n---\n# Title\n")
        assert named in error and not warnings

    def test_metadata_that_is_right(self):
        good = (
            "---\nlanguage: [en, de]\nlicense: apache-2.0\ntags: [a b]\nbase_model: owner/model\nmodel-index:\n"
            "- name: m\n  results:\n  - task: {type: text-generation}\n    dataset: {type: gsm8k, name: GSM8K}\n"
            "    metrics: [{type: exact_match, value: 0.5}]\n---\n"
        )
        assert validate_metadata(good) == ([], [])
        assert validate_metadata("# Title\n") == ([], ["empty or missing yaml metadata in repo card"])
        assert validate_metadata("---\n---\n") == ([], ["empty or missing yaml metadata in repo card"])
