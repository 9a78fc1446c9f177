class Watch:
    def __init__(self, ranks, *, timeout, resume, report=print):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def at(self, place):
        pass

    def failed(self, sentence, code=1):
        pass

    def explain(self, error):
        return None
