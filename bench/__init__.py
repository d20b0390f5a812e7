"""The instrument: one case list, one timer, one store; `python -m bench list|run|compare|report|env`."""
