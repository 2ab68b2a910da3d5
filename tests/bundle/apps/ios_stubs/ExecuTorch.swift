import Foundation

public enum DataType { case byte, char, short, int, long, half, float, double, bool }

public protocol ValueConvertible { func asValue() -> Value }

public final class AnyTensor: ValueConvertible {
    public enum ShapeDynamism { case `static`, dynamicBound }
    public var shape: [Int] { [] }
    public var dataType: DataType { .float }
    public init(
        data: Data, shape: [Int], strides: [Int] = [], dimensionOrder: [Int] = [], dataType: DataType,
        shapeDynamism: ShapeDynamism = .dynamicBound
    ) {}
    public func bytes(_ handler: (UnsafeRawPointer, Int, DataType) -> Void) {}
    public func asValue() -> Value { Value() }
}

public final class Value: ValueConvertible {
    public var anyTensor: AnyTensor? { nil }
    public func asValue() -> Value { self }
}

public struct Tensor<T> {}

public final class Module {
    public init(filePath: String) {}
    public func forward(_ inputs: [ValueConvertible]) throws -> [Value] { [] }
    public func forward(_ inputs: ValueConvertible...) throws -> [Value] { [] }
}
