"""The fake Hub's writing side: repositories, branches, tags, and commits with LFS uploads (without Xet)."""

import base64
import hashlib
import json
import shutil

from .store import File, HubError, is_lfs


def routes(kind, api, repo, rev):
    return [
        ("POST", f"/{kind}{repo}\\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", "/_lfs/(.+)", "lfs_put"),
        ("POST DELETE", "/api/repos/(create|delete)", "repos"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", f"{api}{repo}/preupload/{rev}", "preupload"),
        ("POST", f"{api}{repo}/commit/{rev}", "commit"),
        ("POST DELETE", f"{api}{repo}/(branch|tag)/{rev}", "ref"),
        ("GET", "/api/whoami-v2", "whoami"),
    ]


class Pushing:
    def whoami(self):
        return {"type": "user", "name": self.user(needed=True), "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def repos(self, action):
        user, asked = self.user(needed=True), json.loads(self.body)
        repo_id, kind = f"{asked.get('organization') or user}/{asked['name']}", asked.get("type") or "model"
        exists = (kind, repo_id) in self.hub.repos
        url = f"{self.hub.endpoint}/{'datasets/' * (kind == 'dataset')}{repo_id}"
        if action == "create":
            if not exists:
                self.hub.repo(repo_id, kind, private=asked.get("visibility") == "private")
            return {
                "url": url,
                **({"error": "You already created this repo"} if exists else {}),
            }, 409 if exists else 200
        if not exists:
            raise HubError(404, "Repository not found", "RepoNotFound")
        shutil.rmtree(self.hub.repos.pop((kind, repo_id)).dir)
        return {}

    def ref(self, kind, repo_id, what, name):
        repo, asked = self.repo(kind, repo_id, write=True), json.loads(self.body or b"{}")
        table, new = (repo.heads, name) if what == "branch" else (repo.tags, asked.get("tag", name))
        if self.command == "DELETE":
            return [table.pop(new, None)]
        if new in table:
            raise HubError(409, "Reference already exists")
        sha = repo.resolve(name if what == "tag" else asked.get("startingPoint") or "main")
        table[new] = sha if what == "tag" else [sha]
        return {}

    def preupload(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        files, asked = repo.commits[repo.resolve(revision)], json.loads(self.body)["files"]
        return {
            "files": [
                {
                    "path": f["path"],
                    "shouldIgnore": False,
                    "oid": getattr(files.get(f["path"]), "etag", None),
                    "uploadMode": "lfs" if is_lfs(f["path"], f["size"]) else "regular",
                }
                for f in asked
            ]
        }

    def lfs_batch(self, kind, repo_id):
        self.repo(kind, repo_id, write=True)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(self.body)["objects"]]
        for o in objects:
            if o["oid"] not in self.hub.lfs:
                o["actions"] = {"upload": {"href": f"{self.hub.cdn_endpoint}/_lfs/{o['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.hub.lfs[oid] = self.body
        return b"", 200, {"ETag": f'"{oid}"'}

    def commit(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id, write=True)
        if revision not in repo.heads:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, head = dict(repo.files(revision)), repo.heads[revision][-1]
        for item in map(json.loads, self.body.splitlines()):
            key, value = item["key"], item["value"]
            path = value.get("path", "?")
            if path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
                raise HubError(400, f"Invalid path in repo: {path}")
            if key == "header" and value.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[path] = File(path, base64.b64decode(value["content"]))
            if key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HubError(400, f"LFS pointer points to a file that does not exist: {path}")
                files[path] = File(path, self.hub.lfs[value["oid"]])
            if key.startswith("deleted"):
                gone = [f for f in files if f == path.rstrip("/") or f.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {n: f for n, f in files.items() if n not in gone}
        if revision == "main":  # the directory is that branch
            for name in repo.files():
                (repo.dir / name).unlink()
            for name, file in files.items():
                (repo.dir / name).parent.mkdir(parents=True, exist_ok=True)
                (repo.dir / name).write_bytes(file.data)
        sha = repo.commit(revision, files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{sha}"}
