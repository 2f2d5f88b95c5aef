"""The one exception that is shown to the user without a traceback."""


class UserError(Exception):
    """A mistake in the input or the settings. The message names the place, what was found, what is allowed."""
