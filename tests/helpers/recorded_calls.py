"""What operations are given by models."""


def recorded_calls(monkeypatch, module, name):
    """Records each call of the operation that `module` knows by `name`; the result is called for their arguments by name, and its
    `clear` forgets them."""
    seen = []
    operation = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: seen.append(args) or operation(*args))

    def calls():
        return [dict(zip(operation.parameters, args)) for args in seen]

    calls.clear = seen.clear
    return calls
