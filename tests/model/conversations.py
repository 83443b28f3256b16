"""Contexts for chat templates: what a gateway passes, and some that templates refuse."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather at a place, e.g. \"Oslo\" <now>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "default": 3, "minimum": 0, "maximum": 14},
            },
            "required": ["city"],
        },
    },
}

BOOK = {
    "type": "function",
    "function": {
        "name": "book_flight",
        "description": "Bucht einen Flug – günstig & schnell.",
        "parameters": {
            "type": "object",
            "properties": {
                "legs": {
                    "type": "array",
                    "description": "The legs",
                    "items": {
                        "type": "object",
                        "properties": {
                            "from": {"type": "string"},
                            "to": {"type": "string"},
                            "price": {"type": "number", "maximum": 999.5},
                        },
                        "required": ["from", "to"],
                    },
                },
                "passenger": {
                    "type": "object",
                    "description": "Who flies",
                    "properties": {
                        "name": {"type": "string"},
                        "age": {"type": ["integer", "null"], "maximum": 18446744073709551615},
                        "tags": {"type": "array", "items": {"type": "string"}},
                    },
                },
                "flexible": {"type": "boolean", "default": False},
                "budget": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
                "class": {"type": "string", "enum": ["first", "second"], "default": "second"},
            },
            "required": ["legs", "passenger"],
        },
    },
}

NO_PARAMETERS = {
    "type": "function",
    "function": {"name": "ping", "description": "No parameters",
                 "parameters": {"type": "object", "properties": {}}},
}


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, number):
    return {"id": f"call{number:05d}", "type": "function",
            "function": {"name": name, "arguments": arguments}}


def result(content, number, name):
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05d}", "name": name}


def tool_turn(arguments, content=None):
    return [user("Weather in Oslo?"),
            assistant(content, tool_calls=[call("get_weather", arguments, 1)]),
            result('{"temperature": -3.5, "sky": "clear"}', 1, "get_weather")]


TALK = [user("Hi"), assistant("Hello! How can I help?"), user("Tell me a joke.")]
UNICODE = [system("Du bist höflich. 你好"), user("Ünïcödé 🎉 — \"quotes\" & <tags> it's\n\n\ttab"),
           assistant("  räume \u00a0 und \u200b mehr \U0001f469\u200d\U0001f680  "), user("さようなら\n")]
THINKING = [user("2+2?"), assistant("4", reasoning_content="Two and two is four."),
            user("And 3+3?"),
            assistant("<think>\nThree plus three.\n</think>\n\n6"), user("Thanks")]
PARTS = [system([{"type": "text", "text": "Be brief."}]),
         user([{"type": "text", "text": "First part. "}, {"type": "text", "text": "Second part."}])]
IMAGE = [user([{"type": "image", "image": "x"}, {"type": "text", "text": "What is this?"}])]
TWO_CALLS = [
    system("Use tools."), user("Weather in Oslo and Rome?"),
    assistant("Let me look.", tool_calls=[
        call("get_weather", {"city": "Oslo", "days": 2, "exact": True, "none": None}, 1),
        call("get_weather", {"city": "Róma <&>", "unit": "celsius", "list": [1, 2.0, "x"],
                             "deep": {"a": {"b": []}}}, 2)]),
    result("cold", 1, "get_weather"), result('["warm", 31]', 2, "get_weather"),
    assistant("Oslo is cold, Rome is warm."), user("Thanks, and tomorrow?")]

BASE = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def contexts():
    out = {}

    def add(name, messages, **more):
        out[name] = {**BASE, "messages": messages, **more}

    add("one user", [user("Hello")])
    add("one user, no prompt", [user("Hello")], add_generation_prompt=False)
    add("tools none", [user("Hello")], tools=None, documents=None)
    add("system", [system("You are helpful."), user("Hello")])
    add("system, several turns", [system("You are helpful.")] + TALK)
    add("several turns", TALK)
    add("ends with assistant", TALK + [assistant("Knock knock.")], add_generation_prompt=False)
    add("ends with assistant, prompt", TALK + [assistant("Knock knock.")])
    add("long", [system("S")] + TALK * 1 + [assistant("A\nB"), user("C"), assistant("D"), user("E"),
                                            assistant(""), user("")])
    add("unicode", UNICODE)
    add("white space", [system("\n  x \n"), user("  padded\t\n\n"), assistant("\n\ny "), user(" ")])
    add("parts", PARTS)
    add("image", IMAGE)
    add("developer", [{"role": "developer", "content": "Answer in French."}, user("Hello")])
    add("unknown role", [{"role": "narrator", "content": "Once"}, user("Hello")])
    add("two users", [user("One"), user("Two")])
    add("starts with assistant", [assistant("I begin"), user("You go on")])
    add("two systems", [system("A"), system("B"), user("C")])
    add("late system", [user("A"), assistant("B"), system("C"), user("D")])
    add("only system", [system("Alone")])
    add("no messages", [])
    add("no content", [{"role": "user"}])
    add("content none", [user("Hi"), assistant(None), user("Again")])
    add("thinking", THINKING)
    add("thinking off", THINKING, enable_thinking=False, thinking=False)
    add("thinking on", THINKING, enable_thinking=True, thinking=True, reasoning_effort="high")
    add("thinking, ends", THINKING[:-1], add_generation_prompt=False)
    add("effort", [user("Hello")], reasoning_effort="low", enable_thinking=True,
        thinking_budget=512)
    add("date", [system("Today?"), user("Hello")], date_string="26 Jul 2024",
        builtin_tools=["wolfram_alpha"], tools_in_user_message=False)
    add("no tokens", [system("S"), user("Hello")], bos_token="", eos_token="")
    add("tool", [user("Weather?")], tools=[WEATHER])
    add("tools, system", [system("Use tools."), user("Weather?")], tools=[WEATHER, BOOK])
    add("tools, empty parameters", [user("Ping")], tools=[NO_PARAMETERS])
    add("tools, no prompt", [user("Weather?")], tools=[BOOK], add_generation_prompt=False)
    add("tools, empty list", [user("Weather?")], tools=[])
    add("tools, bare", [user("Weather?")], tools=[WEATHER["function"]])
    add("tool call", tool_turn({"city": "Oslo", "unit": "celsius"}), tools=[WEATHER])
    add("tool call, text", tool_turn({"city": "Oslo"}, "I'll look."), tools=[WEATHER])
    add("tool call, empty text", tool_turn({"city": "Oslo"}, ""), tools=[WEATHER])
    add("tool call, arguments as text", tool_turn('{"city": "Oslo", "days": 1}'), tools=[WEATHER])
    add("tool call, no arguments", tool_turn({}), tools=[WEATHER])
    add("tool call without tools", tool_turn({"city": "Oslo"}))
    add("tool answered", tool_turn({"city": "Oslo"}) + [assistant("Minus 3.5."), user("Thanks")],
        tools=[WEATHER])
    add("tool answered, ends", tool_turn({"city": "Oslo"}) + [assistant("Minus 3.5.")],
        tools=[WEATHER], add_generation_prompt=False)
    add("two tool calls", TWO_CALLS, tools=[WEATHER, BOOK])
    add("two tool calls, waiting", TWO_CALLS[:5], tools=[WEATHER])
    add("tool call, thinking",
        [user("Weather?"),
         assistant("", reasoning_content="I need the tool.",
                   tool_calls=[call("get_weather", {"city": "Oslo"}, 1)]),
         result("cold", 1, "get_weather")], tools=[WEATHER], enable_thinking=True)
    add("tool result as parts",
        tool_turn({"city": "Oslo"})[:2] +
        [result([{"type": "text", "text": "cold"}], 1, "get_weather")], tools=[WEATHER])
    add("documents", [user("Summarise")],
        documents=[{"title": "T1", "text": "First text"}, {"title": "T2", "text": "Zweiter"}])
    add("functions", [system("S"), user("Hello"), assistant("", tool_calls=[]), user("Again")],
        functions="[]", datetime="2026-01-02")
    add("name of user", [{"role": "user", "name": "Ann", "content": "Hello"}])
    return out
