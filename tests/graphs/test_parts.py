"""Which modules are parts, whatever holds them, and how frozen ones take their places; nothing is compiled."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from pipevault.errors import SettingsError
from pipevault.graphs import adapters
from pipevault.graphs.adapters import adapter_of, generating_methods, main_method, register_adapter
from pipevault.graphs.part import FrozenPart, unfrozen
from pipevault.graphs.parts import attach, detach, find_parts, frozen_parts, get_part, members, replace_part
from pipevault.graphs.state import PartOptions


@pytest.fixture(autouse=True)
def _no_adapters_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", {})


def layer() -> nn.Linear:
    return nn.Linear(2, 2).eval()


class Pipe:
    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self) -> None:
        """Draw nothing."""


class Registered(Pipe):
    """A pipeline as those of diffusers are, which another pipeline may hold."""

    @property
    def components(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Slotted:
    __slots__ = ("__dict__", "_hidden", "unet")

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def __call__(self) -> None:
        """Draw nothing."""


class BareSlots:
    __slots__ = "model"

    def __init__(self, model: nn.Module) -> None:
        self.model = model


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layer(), layer()

    def decode(self) -> None:
        """As autoencoders have it."""


class TestFinding:
    def test_modules_in_slots(self) -> None:
        assert list(find_parts(Slotted(layer()))) == ["unet"]
        assert list(find_parts(BareSlots(layer()))) == ["model"]
        assert [name for name, _ in members(BareSlots(layer()))] == ["model"]

    def test_modules_in_lists_and_dictionaries(self) -> None:
        pipe = Pipe(
            experts=[layer(), layer()],
            pair=(layer(), layer()),
            by_name={"low": layer(), "high": layer()},
            listed=nn.ModuleList([layer()]),
            named=nn.ModuleDict({"a": layer()}),
            texts=["a", 1],
        )
        names = ["experts.0", "experts.1", "pair.0", "pair.1", "by_name.low", "by_name.high", "listed.0", "named.a"]
        assert list(find_parts(pipe)) == names
        for name, module in find_parts(pipe).items():
            assert get_part(pipe, name) is module

    def test_modules_of_pipelines_within(self) -> None:
        prior = Registered(prior=layer())
        pipe = Pipe(decoder_pipe=Registered(unet=layer(), prior_pipe=prior))
        assert list(find_parts(pipe)) == ["decoder_pipe.unet", "decoder_pipe.prior_pipe.prior"]

    def test_pipelines_that_hold_each_other_end(self) -> None:
        one, other = Registered(unet=layer()), Registered(prior=layer())
        one.other, other.one = other, one  # type: ignore[attr-defined]
        assert list(find_parts(one)) == ["unet", "other.prior"]

    def test_an_object_that_is_no_pipeline_is_left_alone(self) -> None:
        assert find_parts(Pipe(helper=Pipe(model=layer()))) == {}

    def test_a_pipeline_that_is_a_module(self) -> None:
        class ModulePipe(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unet, self.vae = layer(), Autoencoder()
                self.__dict__["hidden"] = layer()

        assert list(find_parts(ModulePipe())) == ["unet", "vae.decoder", "vae.encoder", "hidden"]

    def test_an_autoencoder_has_two_sides(self) -> None:
        assert set(find_parts(Pipe(vae=Autoencoder(), coder=Autoencoder()))) == {
            "vae.decoder",
            "vae.encoder",
            "coder.decoder",
            "coder.encoder",
        }

    def test_a_module_in_two_places_is_one_part(self) -> None:
        shared = layer()
        pipe = Pipe(unet=shared, inner=Registered(unet=shared), experts=[shared])
        assert find_parts(pipe) == {"unet": shared}

    def test_what_checks_images_is_no_part(self) -> None:
        assert list(find_parts(Pipe(unet=layer(), safety_checker=layer(), watermark=layer()))) == ["unet"]


class TestWanted:
    def test_any_module_by_dotted_name(self) -> None:
        model = nn.Sequential(layer(), nn.Sequential(layer()))
        pipe = Pipe(model=model, experts=[layer(), layer()], by_name={"low": layer()})
        wanted = ["model.1.0", "experts.1", "by_name.low"]
        found = find_parts(pipe, wanted)
        assert set(found) == set(wanted)
        assert found["model.1.0"] is model[1][0]

    @pytest.mark.parametrize("name", ["nothing", "unet.nothing", "experts.7", "experts.x", "unet.weight", "by_name.no"])
    def test_one_that_is_not_there_is_an_error_that_lists_the_parts(self, name: str) -> None:
        pipe = Pipe(unet=layer(), experts=[layer()], by_name={"low": layer()})
        with pytest.raises(SettingsError, match=rf"has no part {name}\. Its parts: unet, experts\.0, by_name\.low"):
            find_parts(pipe, ["unet", name])


class TestAdapters:
    def test_parts_methods_and_subclasses(self) -> None:
        class Own(Pipe):
            def paint(self) -> None:
                """Draw nothing."""

        class Derived(Own):
            pass

        register_adapter(Own, parts=["inner.net"], methods=["paint"])
        pipe = Derived(inner=Pipe(net=layer()), unet=layer())
        assert list(find_parts(pipe)) == ["inner.net"]
        assert generating_methods(Derived) == ("paint",)
        assert adapter_of(pipe) is not None
        assert list(find_parts(pipe, ["unet"])) == ["unet"]
        assert generating_methods(Pipe) == ("__call__",)

    def test_by_the_name_of_a_class_that_is_not_imported(self) -> None:
        register_adapter("Own", parts=lambda pipe: [f"net{pipe.number}"], methods=["paint"])

        class Own(Pipe):
            def paint(self) -> None:
                """Draw nothing."""

        class Derived(Own):
            pass

        assert list(find_parts(Derived(net3=layer(), net4=layer(), number=4))) == ["net4"]
        assert generating_methods(Derived) == ("paint",)
        assert main_method(Derived) == "paint"
        register_adapter(Own, parts=["net3"], methods=["paint"])
        assert list(find_parts(Derived(net3=layer(), net4=layer(), number=4))) == ["net3"], "the class comes first"

    @pytest.mark.parametrize(
        ("cls", "arguments", "text"),
        [
            ("not a name", {}, "takes a class or the name of one"),
            (Pipe(), {}, "takes a class or the name of one"),
            (Pipe, {"methods": ["paint"]}, "has none of the methods paint"),
            (BareSlots, {}, "has none of the methods __call__, generate"),
            (Pipe, {"methods": ["__call__", "paint"]}, "has no method paint. Its adapter was not registered"),
        ],
    )
    def test_what_is_wrong_with_one_is_said_when_it_is_registered(
        self, cls: Any, arguments: dict[str, Any], text: str
    ) -> None:
        with pytest.raises(SettingsError, match=text):
            register_adapter(cls, **arguments)
        assert adapters._ADAPTERS == {}

    def test_a_part_that_is_not_there_is_an_error(self) -> None:
        register_adapter(Pipe, parts=["unet", "gone", "number"])
        with pytest.raises(SettingsError, match=r"adapter of Pipe names parts that it does not have: gone, number"):
            find_parts(Pipe(unet=layer(), number=3))


class TestReplacing:
    def test_a_module_is_replaced_in_every_place(self) -> None:
        old, new = layer(), layer()
        pipe = Pipe(
            unet=old,
            experts=[layer(), old],
            by_name={"low": old},
            inner=Registered(unet=old, list=[old]),
            model=nn.Sequential(layer(), nn.Sequential(old)),
            listed=nn.ModuleList([old]),
        )
        replace_part(pipe, old, new)
        assert pipe.unet is new  # type: ignore[attr-defined]
        for name in ("experts.1", "by_name.low", "inner.unet", "inner.list.0", "model.1.0", "listed.0"):
            assert get_part(pipe, name) is new, name
        assert get_part(pipe, "experts.0") is not new

    def test_in_slots(self) -> None:
        pipe = Slotted(layer())
        new = layer()
        replace_part(pipe, pipe.unet, new)
        assert pipe.unet is new

    def test_in_a_tuple(self) -> None:
        old, new, other = layer(), layer(), layer()
        pipe = Pipe(pair=(other, old))
        replace_part(pipe, old, new)
        assert get_part(pipe, "pair.1") is new
        assert get_part(pipe, "pair.0") is other


class TestAttaching:
    def test_every_part_becomes_a_frozen_one_and_comes_back(self) -> None:
        shared = layer()
        pipe = Pipe(unet=shared, inner=Registered(net=shared), experts=[layer(), layer()], vae=Autoencoder())
        before = find_parts(pipe)
        states = attach(pipe, list(before), PartOptions(policy="eager"))
        assert list(states) == list(before)
        assert {name: state.name for name, state in states.items()} == {name: name for name in before}
        assert frozen_parts(pipe) == states
        for name, module in before.items():
            part = get_part(pipe, name)
            assert isinstance(part, FrozenPart)
            assert unfrozen(part) is module
        assert get_part(pipe, "inner.net") is get_part(pipe, "unet")
        detach(pipe, list(states))
        assert find_parts(pipe) == before
        assert get_part(pipe, "inner.net") is shared
        assert frozen_parts(pipe) == {}

    def test_parts_in_a_tuple_run_their_graphs(self) -> None:
        pipe = Pipe(pair=(layer(), layer()))
        attach(pipe, list(find_parts(pipe)), PartOptions(policy="eager"))
        assert all(isinstance(module, FrozenPart) for module in pipe.pair)  # type: ignore[attr-defined]

    def test_a_frozen_part_gets_the_new_options(self) -> None:
        pipe = Pipe(unet=layer())
        attach(pipe, ["unet"], PartOptions(policy="eager"))
        part = pipe.unet  # type: ignore[attr-defined]
        (state,) = attach(pipe, ["unet"], PartOptions(policy="off")).values()
        assert pipe.unet is part  # type: ignore[attr-defined]
        assert state.options.policy == "off"

    def test_a_shared_module_wanted_under_both_names_is_one_frozen_part(self) -> None:
        shared = layer()
        pipe = Pipe(unet=shared, inner=Registered(net=shared))
        names = list(find_parts(pipe, ["unet", "inner.net"]))
        states = attach(pipe, names, PartOptions(policy="eager"))
        for name, state in states.items():
            part = get_part(pipe, name)
            assert isinstance(part, FrozenPart)
            assert part.get_graph() is state
