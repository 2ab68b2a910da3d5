import Foundation

public enum Accelerator: Int32 { case none, cpu, gpu, npu }

public final class Environment { public init() throws {} }

public final class OpaqueOptions {}

public final class CpuOptions {
    public init() throws {}
    public func setNumThreads(_ numThreads: Int) throws {}
    public func createOpaqueOptions() throws -> OpaqueOptions { OpaqueOptions() }
}

public final class Options {
    public init() throws {}
    public func setHardwareAccelerators(_ accelerators: Set<Accelerator>) throws {}
    public func addOpaqueOptions(_ opaqueOptions: OpaqueOptions) throws {}
}

public final class Model { public init(filePath: String, environment: Environment? = nil) throws {} }

public enum ElementType { case float32 }

public struct Layout { public let dimensions: [Int] }

public final class TensorBuffer {
    public func write<T>(_ data: [T]) throws {}
    public func write(_ data: Data) throws {}
    public func read() throws -> Data { Data() }
    public func read<T>() throws -> [T] { [] }
}

public final class CompiledModel {
    public init(environment: Environment, model: Model, options: Options? = nil) throws {}
    public func run(
        inputs: [TensorBuffer], outputs: [TensorBuffer], options: Options? = nil, signatureIndex: Int = 0
    ) throws {}
    public func run(inputs: [TensorBuffer], options: Options? = nil, signatureIndex: Int = 0) throws -> [TensorBuffer] { [] }
    public func createInputBuffers(signatureIndex: Int = 0) throws -> [TensorBuffer] { [] }
    public func inputCount(signatureIndex: Int = 0) throws -> Int { 0 }
    public func outputCount(signatureIndex: Int = 0) throws -> Int { 0 }
    public func inputName(inputIndex: Int, signatureIndex: Int = 0) throws -> String { "" }
    public func outputName(outputIndex: Int, signatureIndex: Int = 0) throws -> String { "" }
    public func getOutputTensorLayouts(signatureIndex: Int = 0, updateAllocation: Bool = true) throws -> [Layout] { [] }
    public func resizeInputTensor(inputIndex: Int, dimensions: [Int], signatureIndex: Int = 0) throws {}
}
