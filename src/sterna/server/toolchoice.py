"""What `tools` and `tool_choice` mean for one request.

`auto` leaves the model free and parses what it writes. `required` and a named function constrain
the completion to calls by a schema, so that any model, however small, answers with calls whose
arguments fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from sterna.core.errors import RequestError
from sterna.engine.request import StructuredSpec
from sterna.server.schema import ChatBody, NamedTool, Tool
from sterna.text.tool_choice import forced_call_schema
from sterna.text.tools import ToolParser, ToolStyle


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """`tools` go into the prompt; `style` is how calls are read, None = there are none."""

    tools: tuple[Tool, ...] | None = None
    style: ToolStyle | None = None
    max_calls: int | None = None  # None = any number
    structured: StructuredSpec | None = None

    def parser(self) -> ToolParser | None:
        """A parser for one choice."""
        if self.style is None or self.tools is None:
            return None
        return ToolParser(self.style, [tool.function.name for tool in self.tools])


def plan_tools(body: ChatBody, style: ToolStyle) -> ToolPlan:
    """`style` is what the model was taught; forced calls are always bare JSON.

    Raises RequestError for a choice without tools or an unknown name.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice in (None, "none", "auto"):
            return ToolPlan()
        raise RequestError("tool_choice asks for a call but there are no tools", param="tools")
    if choice == "none":
        return ToolPlan(body.tools)
    max_calls = 1 if body.parallel_tool_calls is False else None
    if choice in (None, "auto"):
        return ToolPlan(body.tools, style, max_calls)
    forced = forced_call_schema(
        [tool.model_dump(exclude_none=True) for tool in body.tools],
        choice.function.name if isinstance(choice, NamedTool) else None,
        # One call unless the client asks for more: a small model would not find an end.
        parallel=body.parallel_tool_calls is True,
    )
    return ToolPlan(body.tools, ToolStyle.JSON, max_calls, StructuredSpec("json_schema", forced))


def merge_constraints(asked: StructuredSpec | None, plan: ToolPlan) -> StructuredSpec | None:
    """The one constraint of the completion; RequestError when the body asks for two."""
    if asked is not None and plan.style is not None:
        raise RequestError(
            "structured output and tool calls exclude each other; "
            "set tool_choice to 'none' or leave out the format",
            param="tool_choice",
        )
    return asked or plan.structured
