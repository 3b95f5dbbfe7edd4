"""What the fake Hub keeps: repositories, their commits and their files."""

import hashlib

LFS_SUFFIXES = (
    ".safetensors",
    ".npz",
    ".npy",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".parquet",
    ".arrow",
    ".h5ad",
    ".zip",
)
LFS_SIZE = 10 * 2**20


def is_lfs(name, size):
    return name.endswith(LFS_SUFFIXES) or size > LFS_SIZE


class HubError(Exception):
    def __init__(self, status, message, code="", **headers):
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class File:
    def __init__(self, name, data):
        self.data, self.size, self.sha256 = data, len(data), hashlib.sha256(data).hexdigest()
        self.lfs = bool(data) and is_lfs(name, len(data))
        version = "version https://git-lfs.github.com/spec/v1"
        pointer = f"{version}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        stored = pointer if self.lfs else data
        self.oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()  # as git names it
        self.etag = self.sha256 if self.lfs else self.oid

    def entry(self, name):
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 130}}
        return {
            "type": "file",
            "path": name,
            "rfilename": name,
            "size": self.size,
            "oid": self.oid,
            "blobId": self.oid,
            **(lfs if self.lfs else {}),
        }


class Repo:
    """`heads`: branch -> commit ids, newest last; `tags`: tag -> commit id; `commits`: id -> {path: File}."""

    gated = private = disabled = False
    allowed = ()  # users let into a gated repository

    def __init__(self, folder, repo_id):
        self.dir, self.id, self.heads, self.tags, self.commits, self.seen = folder, repo_id, {}, {}, {}, {}
        self.dir.mkdir(parents=True, exist_ok=True)
        self.commit("main", {})

    def commit(self, branch, files):
        base = repr((self.id, branch, len(self.commits), sorted((n, f.sha256) for n, f in files.items())))
        sha = hashlib.sha1(base.encode()).hexdigest()
        self.commits[sha] = files
        self.heads.setdefault(branch, []).append(sha)
        return sha

    def files(self, branch="main"):
        return self.commits[self.heads[branch][-1]]

    def sync(self):
        """Take in what was changed under `dir` by hand."""
        found = {}
        for path in sorted(p for p in self.dir.rglob("*") if p.is_file() and not p.is_symlink()):
            name, stamp = (
                path.relative_to(self.dir).as_posix(),
                (path.stat().st_mtime_ns, path.stat().st_size),
            )
            if self.seen.get(name, (None,))[0] != stamp:
                self.seen[name] = stamp, File(name, path.read_bytes())
            found[name] = self.seen[name][1]
        if {n: f.sha256 for n, f in found.items()} != {n: f.sha256 for n, f in self.files().items()}:
            self.commit("main", found)

    def resolve(self, revision):
        sha = self.heads.get(revision, [self.tags.get(revision, revision)])[-1]
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha
