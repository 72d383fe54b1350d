"""The hub's side of push_to_hub, without a network: a repository is a folder."""

import shutil
import types

import huggingface_hub


class FakeHub:
    """What huggingface_hub.HfApi does to one repository, which has no model card yet."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.created = folder, []
        for name in ("create_repo", "create_commit", "upload_folder"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))
        monkeypatch.setattr(huggingface_hub.ModelCard, "load", self.load_card)

    def create_repo(self, repo_id, **options):
        self.created.append((repo_id, options))
        self.folder.mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, path)
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def load_card(self, *args, **options):
        raise huggingface_hub.errors.EntryNotFoundError("there is none")
