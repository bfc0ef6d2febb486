"""A store's files, held to its commit records."""


def assert_no_stray_file(store):
    """Every file below ``data/`` is one that a newest commit names, and every such one is there."""
    committed = {
        f"{commit.layer}/{file.path}"
        for layer in store.list_layers()
        for commit in store.newest_commits(layer.folder).values()
        for file in commit.files
    }
    data = [path for path, _ in store.storage.list_files() if "/data/" in path]
    assert sorted(data) == sorted(committed)
