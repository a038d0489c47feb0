"""Exported files run elsewhere as in PyTorch, whatever the batch and size, and one that does not is never left."""

import collections
import dataclasses
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1
from timm.models.resnet import BasicBlock
from tiny_network import tiny_resnet
from torch import Tensor, nn

import dense_shortcuts as ds
from dense_shortcuts import extras
from dense_shortcuts.cli import main
from dense_shortcuts.experiments.train.checkpoint import read_model
from dense_shortcuts.experiments.train.run import data_of
from dense_shortcuts.export import export, formats, graph, proof, run, save_for_hub
from dense_shortcuts.export.images import photographs


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def own_accuracy(folder) -> float:
    """Accuracy of the checkpoint in PyTorch, by the command's own images."""
    model, card = read_model(folder)
    _, data = data_of(folder, card)
    items = [data.test[0, place] for place in range(len(data.test))]
    with torch.no_grad():
        predicted = model.eval()(torch.stack([image for image, _ in items])).argmax(1)
    return 100 * float((predicted == torch.tensor([label for _, label in items])).float().mean())


def test_onnx_agrees_at_any_batch_and_size_and_in_int8_nearly(checkpoint, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setenv("DENSE_SHORTCUTS_BACKEND", "native")  # which must not come into the graph
    folder = checkpoint(norm="group")
    card = (folder / "model.json").read_bytes()
    assert main(["export", str(folder), "--to", "onnx", "--int8"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "batches of 1, 2 and 5 test images of digits at 8x8 and 16x12" in said and "note: group norm" in said

    model = onnx.load(folder / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    batch, channels, *sides = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and channels.dim_value == 3 and all(side.dim_param for side in sides)
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    net = read_model(folder)[0].eval()
    for shape in ((1, 3, 8, 8), (3, 3, 9, 21), (7, 3, 16, 8)):  # none of them was part of the proof
        x = torch.randn(shape)
        with torch.no_grad():
            expected = net(x)
        got = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    record = json.loads((folder / "model.onnx.json").read_text())
    seen = {(c["batch"], c["height"], c["width"]) for c in record["checks"]}
    assert seen == {(n, h, w) for n in (1, 2, 5) for h, w in ((8, 8), (12, 16))}
    assert record["accuracy"]["float32"] == pytest.approx(own_accuracy(folder))
    quantised = onnx.load(folder / "model-int8.onnx")
    kinds = collections.Counter(node.op_type for node in quantised.graph.node)
    assert kinds["QuantizeLinear"] and kinds["DequantizeLinear"]
    eighths = [t for t in quantised.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert len(eighths) == sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert (folder / "model.json").read_bytes() == card


def test_torch_export_and_torchao(checkpoint, capsys):
    pytest.importorskip("torchao")
    folder = checkpoint(norm="batch")
    assert main(["export", str(folder), "--to", "torch-export", "--int8"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "in int8" in said and "note" not in said  # batch norm has been folded away
    net, run_file = read_model(folder)[0].eval(), torch.export.load(folder / "model.pt2").module()
    program = torch.export.load(folder / "model.pt2")
    assert not [n for n in program.graph.nodes if "norm" in str(n.target) or "dense_shortcuts" in str(n.target)]
    in_int8 = torch.export.load(folder / "model-int8.pt2").module()
    for shape in ((1, 3, 8, 8), (3, 3, 10, 21)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = net(x)
            torch.testing.assert_close(run_file(x), expected, rtol=1e-4, atol=1e-4)
            error = (in_int8(x) - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.2
    assert json.loads((folder / "model.pt2.json").read_text())["accuracy"]["float32"] == pytest.approx(
        own_accuracy(folder)
    )


def test_openvino_agrees_in_float32(checkpoint, capsys):
    openvino = pytest.importorskip("openvino")
    folder = checkpoint(norm="batch")
    before = names(folder)
    assert main(["export", str(folder), "--to", "openvino"]) == 0, capsys.readouterr().err
    assert names(folder) - before == {"model.xml", "model.bin", "model.xml.json"}
    checks = json.loads((folder / "model.xml.json").read_text())["checks"]
    assert len(checks) == 6 and max(check["difference"] for check in checks) < 1e-4
    kinds = {op.get_element_type().get_type_name() for op in openvino.Core().read_model(folder / "model.xml").get_ops()}
    assert "f32" in kinds and "f16" not in kinds


@pytest.mark.long
def test_executorch_agrees_up_to_the_largest_images_and_refuses_larger_ones(checkpoint, capsys):
    pytest.importorskip("executorch.runtime")
    folder = checkpoint()  # group norm: var_mean, which ExecuTorch has not
    before = names(folder)
    assert main(["export", str(folder), "--to", "executorch"]) == 0, capsys.readouterr().err
    assert names(folder) - before == {"model.pte", "model.pte.json"}
    checks = json.loads((folder / "model.pte.json").read_text())["checks"]
    assert len(checks) == 6 and max(check["difference"] for check in checks) < 1e-4
    run_file, net = formats.load_executorch(folder / "model.pte"), read_model(folder)[0].eval()
    batch, side = formats.LARGEST
    for shape in ((batch, 3, 24, 9), (1, 3, side, side)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run_file(x), net(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):
        run_file(torch.randn(batch + 1, 3, side, side))


def off_by(amount: float):
    """A runtime that is wrong in one score of the last case alone."""

    def wrap(run: formats.Runner) -> formats.Runner:
        def wrong(x: Tensor) -> Tensor:
            y = run(x).detach().clone()
            if len(x) == 5 and x.shape[2] != x.shape[3]:
                y[-1, -1] += amount
            return y

        return wrong

    return wrap


def test_a_file_whose_runtime_differs_is_refused_and_what_was_there_stays(checkpoint, monkeypatch, capsys):
    real = formats.FORMATS["torch-export"]
    faulty = dataclasses.replace(real, load=lambda path: off_by(2e-3)(real.load(path)))
    monkeypatch.setitem(formats.FORMATS, "torch-export", faulty)
    folder = checkpoint()
    (folder / "model.pt2").write_text("an earlier one")
    before = names(folder)
    assert main(["export", str(folder), "--to", "torch-export"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "dsnet: error: model.pt2 was refused: its scores differ from PyTorch's by 0.002 on 5 images"
    )
    assert error.count("\n") == 1 and "no file was kept" in error
    assert names(folder) == before and (folder / "model.pt2").read_text() == "an earlier one"


def test_the_proof_fails_on_one_wrong_score_on_none_at_all_and_on_another_shape():
    net, images = tiny_resnet().eval(), torch.randn(5, 3, 8, 8)
    assert len(proof.prove(net, net, images)) == 6
    assert max(check.difference for check in proof.prove(net, off_by(5e-5)(net), images)) > 4e-5
    for run_file, fault in (
        (off_by(2e-3)(net), "differ from PyTorch's by 0.002 on 5 images of 16x12"),
        (off_by(float("nan"))(net), "differ from PyTorch's by nan"),
        (lambda x: net(x)[:1], r"scores are \(1, 10\) and PyTorch's \(2, 10\)"),
    ):
        with pytest.raises(ds.DenseShortcutError, match=fault):
            proof.prove(net, run_file, images)


def test_norms_of_one_group_never_become_instance_norm(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = ds.plug_in(tiny_resnet(norm_layer=GroupNorm1, num_classes=5), norm="layer").eval()
    assert any("one group" in text for text in graph.warnings(net))
    assert sum(isinstance(m, nn.GroupNorm) and m.num_groups == 1 for m in net.modules()) == 7
    path = tmp_path / "net.onnx"
    images = torch.randn(5, 3, 8, 8)
    checks = proof.proven(graph.inference_form(net), images, path, formats.FORMATS["onnx"])
    kinds = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert not kinds["InstanceNormalization"] and not kinds["GroupNormalization"] and kinds["ReduceMean"]
    assert len(checks) == 6


def test_a_written_group_norm_is_group_norm():
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    for groups in (1, 2, 3, 6):
        torch.testing.assert_close(
            graph.written_group_norm(x, groups, weight, bias, 1e-3), F.group_norm(x, groups, weight, bias, 1e-3)
        )


def test_a_network_that_reduces_by_32_is_traced_for_any_size_above_that():
    net = timm.models.resnet.ResNet(BasicBlock, (1, 2, 1, 1), channels=(4, 4, 8, 8), num_classes=5)
    ready = graph.inference_form(ds.plug_in(net))
    program = graph.capture(ready, 64)
    assert len(program.range_constraints) == 3
    assert len(proof.prove(ready, program.module(), torch.randn(5, 3, 64, 64))) == 6
    bounded = graph.capture(ready, 64, largest=(8, 128)).range_constraints.values()
    assert sorted(each.upper for each in bounded) == [8, 128, 128]


def test_a_network_of_one_size_is_refused():
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 5}
    fixed = timm.models.vision_transformer.VisionTransformer(**settings).eval()
    with pytest.raises(ds.DenseShortcutError, match="cannot trace the network for any batch and size"):
        graph.capture(fixed, 8)


def test_what_is_made_ready_for_export_leaves_the_network_alone():
    host = tiny_resnet(num_classes=5)
    host.layer1.insert(1, nn.Conv2d(8, 8, 1))  # between the blocks, so that each is a row with a shortcut of its own
    net = ds.plug_in(host, norm="batch").train()
    assert [len(stage.shortcuts) for stage in ds.dense_stages(net).values()] == [2]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ready = graph.inference_form(net)
    assert net.training and not ready.training
    assert {s.backend for m in ds.dense_stages(ready).values() for s in m.shortcuts.values()} == {"plain"}
    assert {s.backend for m in ds.dense_stages(net).values() for s in m.shortcuts.values()} == {"auto"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    host = graph.inference_form(tiny_resnet().train())
    assert not host.training and not ds.dense_stages(host)


def test_a_missing_library_is_named_before_anything_is_done(checkpoint, monkeypatch, capsys):
    folder = checkpoint()
    before = names(folder)

    monkeypatch.setattr(extras, "is_installed", lambda module: module in extras.EXTRAS["train"])
    monkeypatch.setattr(run, "read_model", None)
    for to, library, extra in (
        ("executorch", "executorch", "executorch"),
        ("onnx", "onnx", "export"),
        ("openvino", "onnx", "export"),
    ):
        assert main(["export", str(folder), "--to", to]) == 2
        error = capsys.readouterr().err
        assert f"needs {library}: pip install 'dense-shortcuts[{extra}]'." in error
    assert main(["export", str(folder), "--to", "torch-export", "--int8"]) == 2
    assert "needs torchao" in capsys.readouterr().err
    assert names(folder) == before


def test_what_cannot_be_exported_is_refused(checkpoint, tmp_path):
    folder = checkpoint()
    for arguments, fault in (
        ({"to": "tflite"}, "unknown format 'tflite'"),
        ({"to": "openvino", "int8": True}, "int8 is available for onnx and torch-export"),
        ({"to": "torch-export", "output": tmp_path / "no" / "net"}, "is not a folder"),
        ({"to": "torch-export", "data": "imagefolder", "data_dir": str(tmp_path / "no")}, "is not a folder"),
    ):
        with pytest.raises(ds.DenseShortcutError, match=fault):
            export(folder, **arguments)
    with pytest.raises(ds.DenseShortcutError, match="is no checkpoint"):
        export(tmp_path / "none", "torch-export")
    with pytest.raises(ds.DenseShortcutError, match="give --output"):
        export("shipped", "torch-export")
    with pytest.raises(ds.DenseShortcutError, match="give --output"):
        save_for_hub("shipped")


def test_photographs_stand_in_where_the_runs_images_are_gone(checkpoint, monkeypatch, tmp_path):
    folder = checkpoint()
    card = json.loads((folder / "model.json").read_text())
    images = photographs(card)
    assert images.shape == (5, 3, 8, 8) and images.std() > 0.3
    assert len({tuple(image.flatten().tolist()) for image in images}) == 5

    def gone(*args):
        raise ds.DenseShortcutError("the images are not there.")

    monkeypatch.setattr(run, "run_images", gone)
    given = {"data": None, "data_dir": None, "limit_test": None}
    own, shown, what = run._proof_images(folder, card, given, must=False)
    assert own is None and torch.equal(shown, images) and "photographs" in what
    with pytest.raises(ds.DenseShortcutError, match="not there"):
        run._proof_images(folder, card, given, must=True)
